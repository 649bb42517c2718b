"""A tiny open_clip model, trained on captions of generated scenes: a CLIP teacher where no published weights can be had.

Images of scenes and captions such as "a ring above a small star" meet in one space. The model is saved in open_clip's layout,
and loads by the path of published weights: `benchmarks.scene_clip:scene_clip` is a teacher's name.
"""

import json
import math
from collections.abc import Callable, Sequence
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

SIDE = 64
NAME = "scene-clip"
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "init_logit_scale": math.log(30),
    "vision_cfg": {
        "image_size": SIDE,
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 2},
}
TEMPLATE = "a {}"
BATCH = 32
SHIFT = 4
"""Largest shift of an image in training, in pixels."""


def scene_clip(options: TeacherOptions) -> Teacher:
    """Factory of the teacher, in any process."""
    register(Path(options.weights).parent)
    return clip(TeacherOptions(NAME, options.weights, options.input_size, options.pool, options.args))


def register(folder: Path) -> None:
    """Make open_clip know the model in this process, by a file in the folder of its weights."""
    file, described = folder / f"{NAME}.json", json.dumps(CONFIG)
    if not file.exists() or file.read_text() != described:
        file.write_text(described)
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


def train_clip(source: SampleScenes, tower_epochs: int, epochs: int, file: Path) -> None:
    """Train the image tower on the labels of the scenes for `tower_epochs`, then both towers on their captions for `epochs`.

    Both towers from scratch would need far more scenes, because their embeddings are nearly alike at first. So the image tower
    starts trained, as in LiT (Zhai et al. 2022).
    """
    register(file.parent)
    torch.manual_seed(source.seed)
    scenes = [source.scene(number) for number in range(source.count)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    model = open_clip.create_model(NAME).to(memory_format=torch.channels_last).train()
    labels = torch.tensor([scene.label for scene in scenes])
    classifier = nn.Linear(CONFIG["embed_dim"], len(CLASSES))
    tower = [{"params": [*model.visual.parameters(), *classifier.parameters()], "lr": 3e-3}]
    classify = lambda rows: F.cross_entropy(classifier(model.visual(augmented(images[rows]))), labels[rows])  # noqa: E731
    _train(tower, classify, source.count, tower_epochs, "train CLIP's image tower")
    described = Captions(scenes, source.seed)
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("visual.")]
    towers = [{"params": [*model.visual.parameters()], "lr": 5e-4}, {"params": rest, "lr": 1e-3}]
    contrast = lambda rows: contrastive_loss(model, augmented(images[rows]), *described.draw(rows))  # noqa: E731
    _train(towers, contrast, source.count, epochs, "train CLIP")
    torch.save(model.eval().state_dict(), file)


class Captions:
    """The captions of scenes, and which of them are true of which scene."""

    def __init__(self, scenes: Sequence[Scene], seed: int) -> None:
        self.told, self.random = [captions(scene) for scene in scenes], np.random.default_rng(seed)
        self.known = {text: number for number, text in enumerate(sorted({text for own in self.told for text in own}))}
        self.tokens = open_clip.get_tokenizer(NAME)([*self.known])
        self.true = torch.zeros(len(scenes), len(self.known), dtype=torch.bool)
        for row, texts in enumerate(self.told):
            self.true[row, [self.known[text] for text in texts]] = True

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One caption for each of B scenes, as tokens [B, L], and whether it is true of each, [B, B]; half are the shortest."""
        own = [self.told[row] for row in rows.tolist()]
        picked = torch.tensor(
            [self.known[texts[self.random.integers(len(texts)) * self.random.integers(2)]] for texts in own]
        )
        return self.tokens[picked], self.true[rows][:, picked]


def _train(
    groups: list[dict[str, Any]], loss_of: Callable[[Tensor], Tensor], count: int, epochs: int, title: str
) -> None:
    """Minimise the loss of rows of `count` scenes."""
    steps = count // BATCH
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps * epochs, pct_start=0.1)
    with Progress(steps * epochs, "step", title) as progress:
        for _ in range(epochs):
            for rows in torch.randperm(count)[: steps * BATCH].view(steps, BATCH):
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([each for group in groups for each in group["params"]], 1.0)
                optimizer.step()
                schedule.step()
                progress.update()


def contrastive_loss(model: Any, images: Tensor, texts: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss of images [B, 3, H, W] and texts [B, L], with every text that is `true` [B, B] of an image as its positive.

    As in UniCL (Yang et al. 2022): "a ring" is true of many scenes of a batch.
    """
    embedded, described = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * embedded @ described.T
    pairs = (logits, true.float()), (logits.T, true.T.float())
    losses = [F.cross_entropy(scores, right / right.sum(dim=1, keepdim=True)) for scores, right in pairs]
    return sum(losses, torch.zeros(())) / 2


def augmented(images: Tensor) -> Tensor:
    """Pixels as the teacher takes them, mirrored and shifted at random: no caption says left or right."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = (images / 255 - mean) / std
    pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    shift = tuple(torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist())
    return pixels.roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
