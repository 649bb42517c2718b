"""Image classification: timm's augmentation and mixing, a normalised linear head, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from pipeline.downstream.base import Downstream, Report, Split, device_of, evenly
from pipeline.downstream.classify.config import ClassifyConfig
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.images import LabelledImages, open_labelled
from pipeline.downstream.pictures import caption
from pipeline.downstream.sampling import Draw, prepare, seeded
from pipeline.errors import UserError
from pipeline.student.model import Encoder
from pipeline.training.worker import Worker


class LabelledBatch(NamedTuple):
    """images float32 [B, 3, S, S] RGB in [0, 1]; targets float32 [B, K], distributions over the classes."""

    keys: list[str]
    images: Tensor
    targets: Tensor


class Classifier(nn.Module):
    """Backbone, average pool, BatchNorm and a linear layer, as ReGLA's own head.

    Args:
        classes: number K of classes.
    """

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(encoder.dim)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in [0, 1] -> logits [B, K]."""
        logits: Tensor = self.head(self.norm(self.encoder(images)))
        return logits


class Classification(Downstream):
    """Classification with soft targets, as mixing and smoothing make them."""

    name, headline = "classify", "top1"

    def open(self, config: FinetuneJobConfig, split: Split, classes: Sequence[str] = ()) -> LabelledImages | None:
        """Labelled images of a split."""
        if split == "train":
            _refuse_odd(config, config.train.batch_size // max(1, config.train.most_workers))
        return open_labelled(config, split, classes)

    def build(self, encoder: Encoder, classes: Sequence[str], config: FinetuneJobConfig) -> Classifier:
        """Any backbone will do."""
        return Classifier(encoder, len(classes))

    def settings(self, config: FinetuneJobConfig) -> Mapping[str, Mapping[str, Any]]:
        """How images are brought to the size that it was trained at."""
        return {
            "student": {"input_size": config.student.input_size},
            "classify": {"crop_share": config.section(ClassifyConfig).crop_share},
        }

    def batch(self, examples: LabelledImages, config: FinetuneJobConfig, draws: Sequence[Draw]) -> LabelledBatch:
        """Each image is augmented by its own seed; mixing is seeded by the first one."""
        _refuse_odd(config, len(draws))
        rows = [draw.row for draw in draws]
        augment = training_transform(config)
        pixels = []
        for draw, image in zip(draws, examples.images(rows), strict=True):
            with seeded(config.seed, draw.number):
                pixels.append(augment(image))
        labels, classes = torch.from_numpy(examples.labels[rows]), len(examples.classes)
        images, settings = torch.stack(pixels), config.section(ClassifyConfig)
        if settings.mixup or settings.cutmix:
            with seeded(config.seed, draws[0].number, 1):
                mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
                images, targets = mix(images, labels)
        else:
            targets = mixup_target(labels, classes, smoothing=settings.smoothing)
        return LabelledBatch([examples.key(row) for row in rows], images, targets)

    def loss(self, module: nn.Module, batch: LabelledBatch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with the target distributions."""
        logits = module(batch.images.to(device, non_blocking=True))
        return F.cross_entropy(logits.float(), batch.targets.to(device, non_blocking=True)), {}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, examples: LabelledImages, config: FinetuneJobConfig, worker: Worker) -> Report:
        """Top-1, top-5 and mean class accuracy in percent on centre crops."""
        device, count = device_of(model), len(examples.classes)
        confusion = MulticlassConfusionMatrix(count, validate_args=False).to(device)
        fifth = MulticlassAccuracy(count, top_k=min(5, count), average="micro", validate_args=False).to(device)
        for rows, images in _held_out(examples, config, worker.own_rows(len(examples))):
            logits = model(images.to(device)).float()
            labels = torch.from_numpy(examples.labels[rows]).to(device)
            confusion.update(logits.argmax(1), labels)
            fifth.update(logits, labels)
        matrix, top5 = confusion.compute().cpu(), 100 * float(fifth.compute())
        metrics, table = classification_metrics(matrix, examples.classes)
        metrics["top5"] = top5
        pictures = {} if worker.rank else _pictures(model, examples, config)
        return Report(metrics, table, matrix, pictures)


def _refuse_odd(config: FinetuneJobConfig, images: int) -> None:
    """Mixing needs pairs; of how many GPUs there are, only the workers know (`train.workers=0`)."""
    if (config.section(ClassifyConfig).mixup or config.section(ClassifyConfig).cutmix) and images % 2:
        raise UserError(f"train.batch_size: classify.mixup and cutmix mix pairs, and {images} images a worker are odd")


def training_transform(config: FinetuneJobConfig) -> Callable[[Any], Tensor]:
    """timm's training augmentation, to float32 [3, S, S] in [0, 1] but where pixels were erased by noise."""
    settings, size = config.section(ClassifyConfig), config.student.input_size
    # Erasing draws noise of the scale of normalised pixels; the model normalises by itself, hence the way back.
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    transform = create_transform(
        (3, size, size),
        is_training=True,
        scale=(settings.min_area, 1.0),
        auto_augment=settings.augment,
        interpolation="bicubic",
        re_prob=settings.erase,
        re_mode="pixel",
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )
    return v2.Compose([transform, v2.Normalize((-mean / std).tolist(), (1 / std).tolist())])


def held_out_transform(config: FinetuneJobConfig) -> Callable[[Any], Tensor]:
    """timm's resize and centre crop of a PIL image, to float32 [3, S, S] in [0, 1]."""
    size = config.student.input_size
    share = config.section(ClassifyConfig).crop_share
    steps: Callable[[Any], Tensor] = create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=share, mean=(0,) * 3, std=(1,) * 3
    )
    return steps


def _held_out(
    examples: LabelledImages, config: FinetuneJobConfig, rows: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    steps = held_out_transform(config)
    chunks = [
        list(rows[first : first + config.train.batch_size]) for first in range(0, len(rows), config.train.batch_size)
    ]

    def make(chunk: list[int]) -> tuple[list[int], Tensor]:
        return chunk, torch.stack([steps(image) for image in examples.images(chunk)])

    yield from prepare(make, chunks, config.finetune.data_workers)


def classification_metrics(
    matrix: Tensor, classes: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, str | float]]]:
    """Top-1 and mean class accuracy in percent, and a table by class, from int64 [K, K] true by predicted class.

    Classes without an image are left out of the mean.
    """
    counts = matrix.sum(1)
    share = 100 * matrix.diag().double() / counts.clamp(min=1)
    metrics = {
        "top1": 100 * float(matrix.diag().sum() / counts.sum().clamp(min=1)),
        "mean_class_accuracy": float(share[counts > 0].mean()),
    }
    table: list[dict[str, str | float]] = [
        {"class": name, "images": int(images), "accuracy": round(float(accuracy), 2)}
        for name, images, accuracy in zip(classes, counts, share, strict=True)
    ]
    return metrics, table


def _pictures(model: nn.Module, examples: LabelledImages, config: FinetuneJobConfig) -> dict[str, Tensor]:
    rows = evenly(len(examples), config.finetune.pictures)
    pictures: dict[str, Tensor] = {}
    for chunk, images in _held_out(examples, config, rows):
        confidence, predicted = model(images.to(device_of(model))).float().softmax(1).cpu().max(1)
        for row, image, share, label in zip(chunk, images, confidence, predicted, strict=True):
            true, guess = examples.classes[examples.labels[row]], examples.classes[int(label)]
            pictures[examples.key(row)] = caption(image, [f"true: {true}", f"predicted: {guess} ({share:.0%})"])
    return pictures
