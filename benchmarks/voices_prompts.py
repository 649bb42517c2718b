"""Prompts, end to end without published weights: a tiny SAM learns the masks of generated scenes, then teaches a ReGLA-T.

    python benchmarks/voices_prompts.py --to work/voices/prompts --seed 0

The SAM is saved in the layout of the authors' checkpoints, and loads by the path of a published one. The student learns from its
cached embeddings, together with HOG. Both are measured on unseen scenes, with ground-truth boxes as prompts. `blank_mask_iou` is
the decoder's on the mean embedding: what boxes alone give. Last line JSON; `prompts_ratio` is student over teacher.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regla
from pipeline.config.load import load_config
from pipeline.sources.sample_scenes import SampleScenes, Scene
from pipeline.voices.config import PromptsJobConfig
from pipeline.voices.promptable import PromptsPlan, measure, plan_promptable
from pipeline.voices.prompts import Prompts
from teachers.sam_decoder import MaskDecoder
from teachers.sam_masks import SamMasks, box_prompts, to_shares
from teachers.sam_prompts import PromptEncoder

SIDE = 128
"""Of scenes and inputs in pixels: a grid of 8 x 8, and masks of 32 x 32."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, distil, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("work/voices/prompts"), help="folder of SAM, cache and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=1500, help="scenes that SAM and the student learn from")
    parser.add_argument("--sam-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the distillation")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    print(json.dumps(prompts_part(options.to, options.seed, options.scenes, options.sam_epochs, options.epochs)))


def prompts_part(
    folder: Path, seed: int, scenes: int = 1500, sam_epochs: int = 12, epochs: int = 8, held_out: int = 200
) -> dict[str, float]:
    """The figures of one seed, in percent except the ratio and seconds; a SAM that is there already is not trained again."""
    file, started = folder / f"sam-seed{seed}-n{scenes}-e{sam_epochs}.pth", time.perf_counter()
    if not file.exists():
        train_sam(SampleScenes("train", scenes, SIDE, seed), sam_epochs, seed).save(file)
    trained = time.perf_counter()
    samples = {"train": scenes, "val": held_out, "size": SIDE}
    result = regla.distill(
        {
            "name": "voices-prompts",
            "work": str(folder),
            "seed": seed,
            "data": {"samples": samples},
            "teachers": [
                {"model": "hog", "input_size": SIDE, "weight": 0.5},
                {
                    "model": "sam/vit_b",
                    "weights": str(file.resolve()),
                    "input_size": SIDE,
                    "pool": 1,
                    "args": ENCODER,
                },
            ],
            "student": {"name": "regla_t", "input_size": SIDE, "head_dim": 512, "keep_heads": True},
            "train": {"epochs": epochs, "batch_size": 32},
        }
    )
    distilled = time.perf_counter()
    config = load_config(
        PromptsJobConfig,
        {
            "work": str(folder),
            "seed": seed,
            "data": {"samples": samples},
            "evaluate": {"student": str(result.folder)},
            "prompts": {"sam": str(file), "sam_size": SIDE, "sam_args": ENCODER},
        },
    )
    plan = plan_promptable(config)
    figures = measure(plan)
    blank = measure(with_blank_student(plan))["mask_iou"]
    return {
        "seed": seed,
        **figures,
        "prompts_ratio": figures["prompts_ratio"] / 100,
        "blank_mask_iou": blank,
        "knn_after": result.metrics.get("knn_after", math.nan),
        "sam_seconds": trained - started,
        "distill_seconds": distilled - trained,
    }


def with_blank_student(plan: PromptsPlan) -> PromptsPlan:
    """The plan with the mean of SAM's embeddings, over images and places, in the student's place."""
    images = [plan.examples.read(row)[0].permute(1, 2, 0).numpy() for row in plan.rows[:32]]
    found = torch.cat([plan.teacher.embed(image).embedding for image in images])
    mean = found.mean(dim=(0, 2, 3), keepdim=True).expand_as(found[:1])
    blank = Prompts(lambda pixels: mean, plan.teacher.masks, "blank", SIDE, plan.teacher.device)
    return PromptsPlan(blank, plan.teacher, plan.label, plan.examples, plan.rows)


def train_sam(source: SampleScenes, epochs: int, seed: int, batch: int = 16, rate: float = 1e-3) -> TinySam:
    """Train a tiny SAM on boxes of a source's objects: focal and dice loss as in SAM, and its predicted IoU."""
    torch.manual_seed(seed)
    scenes = [source.scene(number) for number in range(source.count)]
    model = TinySam().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * (len(scenes) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(scenes))[: len(scenes) // batch * batch] for _ in range(epochs)])
    random = np.random.default_rng(seed)
    for number, rows in enumerate(order.view(steps, batch).tolist()):
        images, boxes, masks = _batch([scenes[row] for row in rows], random)
        corners, kinds = box_prompts(boxes.flatten(0, 1))
        shares = to_shares(corners, SIDE, SIDE).unflatten(0, boxes.shape[:2])
        embeddings = model.image_encoder.forward_features(images)  # type: ignore[operator]
        logits, iou = model.masks(embeddings, shares, kinds.unflatten(0, boxes.shape[:2]))
        loss = mask_loss(logits[:, :, 0], masks) + _iou_loss(logits[:, :, 0], masks, iou[:, :, 0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 100 == 0:
            print(f"SAM step {number} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


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


if __name__ == "__main__":
    main()
