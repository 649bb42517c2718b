"""A tiny open_clip model, trained on captions of generated scenes: a CLIP teacher where no published weights can be had.

Images of scenes and captions such as "a ring above a small star" meet in one space. The model is saved in open_clip's layout,
and loads by the path of published weights: `benchmarks.scene_clip:scene_clip` is a teacher's name.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.runtime.progress import Progress
from pipeline.sources.sample_scenes import SampleScenes, Scene
from pipeline.sources.shapes import CLASSES
from teachers.base import Teacher, TeacherOptions
from teachers.clip import clip

SIDE = 96
NAME = "scene-clip"
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 2},
}
TEMPLATE = "a {}"
BATCH = 64
SHIFT = 8
"""Largest shift of an image in training, in pixels."""


def scene_clip(options: TeacherOptions) -> Teacher:
    """Factory of the teacher, in any process."""
    register(Path(options.weights).parent)
    return clip(TeacherOptions(NAME, options.weights, options.input_size, options.pool, options.args))


def register(folder: Path) -> None:
    """Make open_clip know the model in this process, by a file in the folder of its weights."""
    file = folder / f"{NAME}.json"
    if not file.exists():
        file.write_text(json.dumps(CONFIG))
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(file)


def captions(scene: Scene) -> list[str]:
    """What is true of a scene: its dominant object, and where the others lie."""
    first, *others = (CLASSES[number] for number in scene.classes)
    centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
    told = [f"a {first}"]
    for other, (x, y) in zip(others, centres[1:] - centres[0], strict=True):
        place = "beside" if abs(x) > abs(y) else "below" if y < 0 else "above"
        told.append(f"a {first} {place} a small {other}")
    return told


def train_clip(source: SampleScenes, epochs: int, file: Path, rate: float = 2e-3) -> None:
    """Train both towers by the contrastive loss, in which equal captions are all positives (Yang et al. 2022, UniCL)."""
    register(file.parent)
    torch.manual_seed(source.seed)
    random = np.random.default_rng(source.seed)
    scenes = [source.scene(number) for number in range(source.count)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    told = [captions(scene) for scene in scenes]
    known = {text: number for number, text in enumerate(sorted({text for texts in told for text in texts}))}
    tokens = open_clip.get_tokenizer(NAME)([*known])
    model = open_clip.create_model(NAME).to(memory_format=torch.channels_last).train()
    steps = source.count // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * epochs, pct_start=0.1)
    with Progress(steps * epochs, "step", "train CLIP") as progress:
        for _ in range(epochs):
            for rows in torch.randperm(source.count)[: steps * BATCH].view(steps, BATCH):
                chosen = torch.tensor([known[told[row][random.integers(len(told[row]))]] for row in rows.tolist()])
                loss = contrastive_loss(model, augmented(images[rows]), tokens[chosen], chosen)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, np.log(100))
                progress.update()
    torch.save(model.eval().state_dict(), file)


def contrastive_loss(model: Any, images: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """The loss of images [B, 3, H, W] and texts [B, L], equal where their `numbers` [B] are."""
    embedded, described = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * embedded @ described.T
    right = (numbers[:, None] == numbers).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def augmented(images: Tensor) -> Tensor:
    """Pixels as the teacher takes them, mirrored and shifted at random: no caption says left or right."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = (images / 255 - mean) / std
    pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    shift = tuple(torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist())
    return pixels.roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
