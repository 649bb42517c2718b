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
from teachers.sam_masks import SamMasks, box_prompts, point_prompts, to_shares
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


def train_sam(source: SampleScenes, epochs: int, file: Path, rate: float = 1e-3, points: bool = False) -> None:
    """Train a tiny SAM on boxes of a source's objects: focal and dice loss as in SAM, and its predicted IoU.

    With `points`, a third of the steps has a point on each object instead, and a third boxes or points with one or two further
    points anywhere.
    """
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
                loss = _loss(model, *_batch([scenes[row] for row in rows], random), points=points)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
    model.eval().save(file)


def _loss(model: TinySam, images: Tensor, boxes: Tensor, masks: Tensor, points: bool) -> Tensor:
    """Of images [B, 3, side, side], boxes [B, N, 4] and masks [B, N, side / 4, side / 4] as shares."""
    corners, kinds = box_prompts(boxes.flatten(0, 1))
    shares, labels = to_shares(corners, SIDE, SIDE), kinds
    further = int(torch.randint(3, ())) if points else 0  # 0: boxes, 1: a point, 2: further points
    if further == 1 or (further == 2 and torch.rand(()) < 0.5):
        shares, labels = point_prompts(_points(masks.flatten(0, 1), 1), torch.ones(len(kinds), 1, dtype=torch.int64))
    if further == 2:
        anywhere = torch.rand(len(kinds), int(torch.randint(1, 3, ())), 2)
        pixels = (anywhere * masks.shape[-1]).long()
        on = masks.flatten(0, 1)[torch.arange(len(kinds))[:, None], pixels[..., 1], pixels[..., 0]] > 0.5
        shares, labels = torch.cat([shares, anywhere], dim=1), torch.cat([labels, on.long()], dim=1)
    embeddings = model.image_encoder.forward_features(images)  # type: ignore[operator]
    logits, iou = model.masks(embeddings, *(part.unflatten(0, boxes.shape[:2]) for part in (shares, labels)))
    several = slice(1, None) if further == 1 else slice(0, 1)
    logits, iou, masks = logits[:, :, several], iou[:, :, several], masks[:, :, None]
    return mask_loss(logits, masks).amin(dim=2).mean() + _iou_loss(logits, masks, iou)


def _points(masks: Tensor, count: int) -> Tensor:
    """Random points [N, count, 2] as shares of the image, in masks [N, h, w] of shares."""
    pixels = torch.multinomial(masks.flatten(1) + 1e-6, count, replacement=True)
    side = masks.shape[-1]
    return (torch.stack([pixels % side, pixels // side], dim=-1) + torch.rand(*pixels.shape, 2)) / side


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """20 parts of focal loss and one of dice loss, as in SAM (section 3, "Losses"): logits and shares [..., h, w] -> [...]."""
    chance = logits.sigmoid()
    masks = masks.expand_as(logits)
    wrong = (chance - masks).abs()
    crossed = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    focal = (wrong.square() * crossed).mean(dim=(-2, -1))
    both, sizes = (chance * masks).sum(dim=(-2, -1)), (chance + masks).sum(dim=(-2, -1))
    return 20 * focal + 1 - (2 * both + 1) / (sizes + 1)


def _iou_loss(logits: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
    found, truth = logits.detach() > 0, masks > 0.5
    either = (found | truth).sum(dim=(-2, -1)).clamp(min=1)
    return F.mse_loss(predicted, (found & truth).sum(dim=(-2, -1)) / either)


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
