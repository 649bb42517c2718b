"""A tiny SAM, trained on the instance masks of generated scenes: a SAM teacher where no published weights can be had.

It is saved in the layout of the authors' checkpoints, and loads by the path of a published one: `sam/vit_b` with `ENCODER` as
its arguments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.runtime.progress import Progress
from pipeline.sources.sample_scenes import SampleScenes, Scene
from teachers.sam_decoder import MaskDecoder
from teachers.sam_masks import SamMasks, box_prompts, to_shares
from teachers.sam_prompts import PromptEncoder

SIDE = 64
"""Of scenes and inputs in pixels: a grid of 4 x 4, and masks of 16 x 16."""
DIM = 64
ENCODER: dict[str, Any] = {
    "img_size": SIDE,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "neck_chans": DIM,
    "window_size": 0,
    "global_attn_indexes": [],
}
"""Arguments of timm's SAM encoder; without windows, all attention is global."""
OBJECTS = 3
"""Prompts per image and step."""
JITTER = 0.05
"""Largest shift of a box's edge in training, as a share of its side."""
BATCH = 16


class TinySam(nn.Module):
    """Image encoder and decoder; their state has the keys of the authors' checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = timm.create_model("samvit_base_patch16", num_classes=0, **ENCODER)
        decoder = MaskDecoder(DIM, inner=32, hidden=128, iou_hidden=DIM)
        self.masks = SamMasks(PromptEncoder(DIM), decoder)

    def save(self, file: Path) -> None:
        """Write the authors' layout; timm has other names for the perceptrons of the image encoder."""
        encoder = self.image_encoder.state_dict().items()
        state = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": value for key, value in encoder}
        torch.save(state | self.masks.state_dict(), file)


def train_sam(source: SampleScenes, epochs: int, file: Path, rate: float = 1e-3) -> None:
    """Train a tiny SAM on boxes of a source's objects: focal and dice loss as in SAM, and its predicted IoU."""
    torch.manual_seed(source.seed)
    random = np.random.default_rng(source.seed)
    scenes = [source.scene(number) for number in range(source.count)]
    model = TinySam().train()
    steps = source.count // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * epochs, pct_start=0.1)
    with Progress(steps * epochs, "step", "train SAM") as progress:
        for _ in range(epochs):
            for rows in torch.randperm(source.count)[: steps * BATCH].view(steps, BATCH).tolist():
                loss = _loss(model, *_batch([scenes[row] for row in rows], random))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
    model.eval().save(file)


def _loss(model: TinySam, images: Tensor, boxes: Tensor, masks: Tensor) -> Tensor:
    """Of images [B, 3, side, side], boxes [B, N, 4] and masks [B, N, side / 4, side / 4] as shares."""
    corners, kinds = box_prompts(boxes.flatten(0, 1))
    shares = to_shares(corners, SIDE, SIDE).unflatten(0, boxes.shape[:2])
    embeddings = model.image_encoder.forward_features(images)  # type: ignore[operator]
    logits, iou = model.masks(embeddings, shares, kinds.unflatten(0, boxes.shape[:2]))
    return mask_loss(logits[:, :, 0], masks) + _iou_loss(logits[:, :, 0], masks, iou[:, :, 0])


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """20 parts of focal loss and one of dice loss, as in SAM (section 3, "Losses"), of [B, N, h, w] with shares in [0, 1]."""
    chance = logits.sigmoid()
    wrong = (chance - masks).abs()
    focal = (wrong.square() * F.binary_cross_entropy_with_logits(logits, masks, reduction="none")).mean()
    both, sizes = (chance * masks).sum(dim=(2, 3)), (chance + masks).sum(dim=(2, 3))
    dice = (1 - (2 * both + 1) / (sizes + 1)).mean()
    return 20 * focal + dice


def _iou_loss(logits: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
    found, truth = logits.detach() > 0, masks > 0.5
    either = (found | truth).sum(dim=(2, 3)).clamp(min=1)
    return F.mse_loss(predicted, (found & truth).sum(dim=(2, 3)) / either)


def _batch(scenes: Sequence[Scene], random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images, jittered boxes [B, N, 4] and masks [B, N, side / 4, side / 4] as shares; half are mirrored."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images, boxes, masks = [], [], []
    for scene in scenes:
        picked = random.choice(len(scene.boxes), OBJECTS)
        image = (torch.from_numpy(scene.image).permute(2, 0, 1) / 255 - mean) / std
        box = torch.from_numpy(scene.boxes[picked])
        mask = torch.from_numpy(scene.masks[picked]).float()
        if random.random() < 0.5:
            image, mask = image.flip(2), mask.flip(2)
            box = torch.stack([SIDE - box[:, 2], box[:, 1], SIDE - box[:, 0], box[:, 3]], dim=1)
        sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
        shift = torch.from_numpy(random.uniform(-JITTER, JITTER, box.shape).astype(np.float32))
        images.append(image)
        boxes.append((box + shift * sides).clamp(0, SIDE))
        masks.append(F.avg_pool2d(mask, 4))
    return torch.stack(images), torch.stack(boxes), torch.stack(masks)
