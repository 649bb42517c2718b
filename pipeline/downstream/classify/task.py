"""Image classification: timm's augmentation and mixing, a normalised linear head, top-1 and top-5."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from pipeline.downstream.backbone import check_input_size
from pipeline.downstream.base import Column, DownstreamTask, ExportForm, Report, SoftTeacher, Split, device_of, evenly
from pipeline.downstream.classify.config import ClassifyConfig
from pipeline.downstream.images import LabelledImages, open_labelled
from pipeline.downstream.pictures import caption
from pipeline.downstream.sampling import Draw, prepare, seeded
from pipeline.downstream.saved import find_model
from pipeline.errors import UserError
from pipeline.imaging.crop import is_thin, resized_centre
from pipeline.sources.base import odd_class
from pipeline.student.model import Encoder
from pipeline.student.nearest import nearest_folders
from pipeline.training.config import LARGEST_BATCH
from pipeline.training.worker import Worker

PICTURE_SIDE = 512
"""Longest side in pixels of the picture of a classified image."""


class LabelledBatch(NamedTuple):
    """images float32 [B, 3, S, S] RGB in [0, 1]; targets float32 [B, K], distributions over the classes."""

    keys: list[str]
    images: Tensor
    targets: Tensor


class SoftTargets:
    """Mixes a trained classifier's probabilities for the same augmented images into the targets of a batch.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2, at temperature 1; the classifier
    sees the student's own augmentation and mixing, as in Beyer et al., "Knowledge distillation: A good teacher is patient and
    consistent" (2022), section 3.

    Args:
        model: [B, 3, H, W] float32 RGB in [0, 1] -> logits [B, K]; in evaluation mode.
        share: of its probabilities in the targets, in (0, 1].
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share

    @torch.no_grad()
    def __call__(self, batch: LabelledBatch, device: torch.device) -> LabelledBatch:
        """The same images with mixed targets, both on the device."""
        images = batch.images.to(device, non_blocking=True)
        probabilities = self.model.to(device)(images).float().softmax(1)
        targets = torch.lerp(batch.targets.to(device), probabilities, self.share)
        return batch._replace(images=images, targets=targets)


class Classifier(nn.Module):
    """Backbone, average pool, BatchNorm and a linear layer, as ReGLA's own head."""

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


class Classification(DownstreamTask[ClassifyConfig]):
    """Classification with soft targets, as mixing and smoothing make them."""

    name, headline, section = "classify", "top1", ClassifyConfig
    columns = (Column("top1", "top1", "top-1"),)
    min_classes = 2
    batched = any_input_size = True

    def open(self, split: Split, classes: Sequence[str] = ()) -> LabelledImages | None:
        """Labelled images of a split."""
        if split == "train":
            train = self.config.train
            self._refuse_odd(train.batch_size // max(1, train.most_workers))
        return open_labelled(self.config, split, classes)

    def build(self, encoder: Encoder, classes: Sequence[str]) -> Classifier:
        """A classifier on any backbone."""
        return Classifier(encoder, len(classes))

    def saved_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Input size and centre crop of the training."""
        return {
            "student": {"input_size": self.config.student.input_size},
            "classify": {"crop_share": self.settings.crop_share},
        }

    def batch(self, examples: LabelledImages, draws: Sequence[Draw]) -> LabelledBatch:
        """Images augmented by their own seeds, and mixed by that of the first one."""
        self._refuse_odd(len(draws))
        settings, seed, rows = self.settings, self.config.seed, [draw.row for draw in draws]
        augment, pixels = self.training_transform(), []
        for draw, image in zip(draws, examples.images(rows), strict=True):
            with seeded(seed, draw.number):
                pixels.append(augment(image))
        images, labels, classes = torch.stack(pixels), torch.from_numpy(examples.labels[rows]), len(examples.classes)
        if settings.mixup or settings.cutmix:
            with seeded(seed, draws[0].number, 1):
                mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
                images, targets = mix(images, labels)
        else:
            targets = mixup_target(labels, classes, smoothing=settings.smoothing)
        return LabelledBatch([examples.key(row) for row in rows], images, targets)

    def loss(self, module: nn.Module, batch: LabelledBatch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with the target distributions."""
        logits = module(batch.images.to(device, non_blocking=True))
        return F.cross_entropy(logits.float(), batch.targets.to(device, non_blocking=True)), {}

    def find_teacher(self, classes: Sequence[str], tracking_uri: str) -> SoftTeacher | None:
        """The classifier that `classify.teacher` names: of the same classes, and for images of `student.input_size`."""
        name = self.settings.teacher
        if name is None:
            return None
        saved = find_model(name, tracking_uri)
        if saved is None or saved.task.name != self.name:
            hint = (nearest_folders(name, ["model"]) if saved is None else "") or "; jobs/finetune.py trains one"
            raise UserError(f"classify.teacher: {name} is not a fine-tuned classifier{hint}")
        if (odd := odd_class(saved.classes, classes)) is not None:
            raise UserError(f"classify.teacher: {name} and data.train differ in their classes: {odd}")
        check_input_size(saved.model, self.image_size(), f"classify.teacher: {name}")
        return SoftTeacher(saved, name, f"{self.settings.teacher_share:.0%} from {name}")

    def make_softener(self, teacher: nn.Module) -> Callable[[LabelledBatch, torch.device], LabelledBatch]:
        """Mixes the teacher's probabilities into the targets."""
        return SoftTargets(teacher, self.settings.teacher_share)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, examples: LabelledImages, worker: Worker) -> Report:
        """Top-1, top-5 and mean class accuracy in percent on centre crops."""
        device, count = device_of(model), len(examples.classes)
        confusion = MulticlassConfusionMatrix(count, validate_args=False).to(device)
        fifth = MulticlassAccuracy(count, top_k=min(5, count), average="micro", validate_args=False).to(device)
        for rows, images in self._held_out(examples, worker.own_rows(len(examples))):
            logits = model(images.to(device)).float()
            labels = torch.from_numpy(examples.labels[rows]).to(device)
            confusion.update(logits.argmax(1), labels)
            fifth.update(logits, labels)
        matrix, top5 = confusion.compute().cpu(), 100 * float(fifth.compute())
        metrics, table = classification_metrics(matrix, examples.classes)
        metrics["top5"] = top5
        return Report(metrics, table, matrix, {} if worker.rank else self._pictures(model, examples))

    def predict(self, model: nn.Module, images: Sequence[Tensor], classes: Sequence[str]) -> list[Tensor]:
        """Probabilities by class, float32 [K] each, on centre crops."""
        steps = self.held_out_transform()
        pixels = torch.stack([steps(to_pil_image(image)) for image in images])
        return list(model(pixels.to(device_of(model))).float().softmax(1).cpu())

    def draw(self, image: Tensor, result: Tensor, classes: Sequence[str]) -> Tensor:
        """The likeliest classes below the image."""
        small = to_pil_image(image)
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return caption(
            pil_to_tensor(small) / 255, [f"{name} ({share:.0%})" for name, share in likeliest(result, classes)]
        )

    def describe(
        self, image: Tensor, result: Tensor, classes: Sequence[str], folder: Path, stem: str
    ) -> dict[str, Any]:
        """The likeliest classes with their probabilities."""
        return {"top": [{"class": name, "probability": share} for name, share in likeliest(result, classes)]}

    def export_form(self, model: nn.Module) -> ExportForm:
        """Logits of the classes."""
        assert isinstance(model, Classifier)
        meaning = "a score for each class; softmax gives probabilities"
        return ExportForm("logits", meaning, self.settings.crop_share, (model.norm, model.head))

    def _refuse_odd(self, images: int) -> None:
        """Mixing needs pairs; with `train.workers=0` only the workers know how many GPUs there are."""
        if (self.settings.mixup or self.settings.cutmix) and images % 2:
            raise UserError(
                f"train.batch_size: classify.mixup and cutmix mix pairs, but {images} images per worker is an odd number"
            )

    def training_transform(self) -> Callable[[Any], Tensor]:
        """timm's training augmentation of a PIL image, to float32 [3, S, S] in [0, 1] except where noise erased pixels."""
        settings, size = self.settings, self.config.student.input_size
        # Erasing draws noise on the scale of normalised pixels; the model normalises by itself, so undo it afterwards.
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

    def held_out_transform(self) -> Callable[[Any], Tensor]:
        """timm's resize and centre crop of a PIL image, to float32 [3, S, S] in [0, 1]; memory is bounded for any shape."""
        size, share = self.config.student.input_size, self.settings.crop_share
        steps = create_transform((3, size, size), interpolation="bicubic", crop_pct=share, mean=(0,) * 3, std=(1,) * 3)

        def transform(image: Any) -> Tensor:
            if is_thin(image):
                return pil_to_tensor(resized_centre(image, math.floor(size / share), size)) / 255
            pixels: Tensor = steps(image)
            return pixels

        return transform

    def _held_out(self, examples: LabelledImages, rows: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        steps, size = self.held_out_transform(), self.config.train.batch_size or LARGEST_BATCH
        chunks = [list(rows[first : first + size]) for first in range(0, len(rows), size)]

        def make(chunk: list[int]) -> tuple[list[int], Tensor]:
            return chunk, torch.stack([steps(image) for image in examples.images(chunk)])

        yield from prepare(make, chunks, self.config.finetune.data_workers)

    def _pictures(self, model: nn.Module, examples: LabelledImages) -> dict[str, Tensor]:
        rows = evenly(len(examples), self.config.finetune.pictures)
        pictures: dict[str, Tensor] = {}
        for chunk, images in self._held_out(examples, rows):
            confidence, predicted = model(images.to(device_of(model))).float().softmax(1).cpu().max(1)
            for row, image, share, label in zip(chunk, images, confidence, predicted, strict=True):
                true, guess = examples.classes[examples.labels[row]], examples.classes[int(label)]
                pictures[examples.key(row)] = caption(image, [f"true: {true}", f"predicted: {guess} ({share:.0%})"])
        return pictures


def likeliest(probabilities: Tensor, classes: Sequence[str], top: int = 5) -> list[tuple[str, float]]:
    """Names and probabilities of the `top` likeliest classes, best first, from probabilities [K]."""
    best = probabilities.topk(min(top, len(classes)))
    return [(classes[number], value) for number, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


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
