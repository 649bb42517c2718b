"""A model ready for images of any size: features of a backbone, and what a fine-tuned model was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from pipeline.downstream.classify.task import held_out_transform
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.detect.task import find_objects
from pipeline.downstream.saved import SavedModel, find_model
from pipeline.downstream.segment.task import predict as predict_labels
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.geometry import FULL
from pipeline.predict.images import Images, decoded, list_images
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import load_student
from pipeline.student.model import Encoder


@dataclass(frozen=True)
class Objects:
    """What a detector found in one image, best first.

    Attributes:
        boxes: float32 [n, 4], left, top, right, bottom in pixels of the image.
        labels: int64 [n], numbers of the classes from 0.
        names: of the classes, n of them.
        scores: float32 [n] in [0, 1].
        masks: bool [n, H, W], or None of a detector without masks.
    """

    boxes: Tensor
    labels: Tensor
    names: list[str]
    scores: Tensor
    masks: Tensor | None


class Predictor:
    """A model on a device.

    Args:
        model: the encoder ([B, 3, H, W] float32 RGB in [0, 1] -> [B, C]) or the fine-tuned model; moved to the device.
        name: of the model, for messages.
        input_size: side in pixels that images are resized to for features, once, bicubic.
        device: of torch; None: a GPU where there is one.
        batch_size: images per forward, where all come to one size.

    Attributes:
        task: ``classify``, ``segment`` or ``detect``; None of a backbone.
        classes: names by number; empty for a backbone.
        unreadable: reasons by file for those that could not be read and were passed over; None, as at first: the first
            that cannot be read raises.

    Raises:
        UserError: for a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module | SavedModel,
        name: str,
        input_size: int,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.input_size, self.batch_size = name, input_size, batch_size
        saved = model if isinstance(model, SavedModel) else None
        self.task = saved.kind.name if saved else None
        self.classes = saved.classes if saved else ()
        self.config = saved.config if saved else FinetuneJobConfig()
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = (model.model if isinstance(model, SavedModel) else model).to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error
        self.encoder = saved.encoder if saved else self.model
        self.unreadable: dict[Path, str] | None = None

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """Vectors [N, C] float32 on the CPU, in the order of :func:`~pipeline.predict.images.list_images`.

        Raises:
            UserError: naming an image that cannot be read.
        """
        size = (self.input_size, self.input_size)
        pixels = (crop_and_resize(image, FULL, size, "bicubic") for image in self._decoded(images))
        parts = []
        while batch := list(islice(pixels, self.batch_size)):
            stacked = torch.from_numpy(np.stack(batch)).to(self.device)
            parts.append(self.encoder(stacked / 255).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, cast(Encoder, self.encoder).dim)

    def classify(self, images: Images, top: int = 5) -> Iterator[list[tuple[str, float]]]:
        """For every image the likeliest classes, best first: name and probability.

        Args:
            top: classes that are given, at most.

        Raises:
            UserError: of a model that is no classifier, or naming an image that cannot be read.
        """
        self.must_be("classify")
        return self._classify(self._decoded(images), top)

    def segment(self, images: Images) -> Iterator[Tensor]:
        """For every image the number of the class of each pixel, int64 [H, W] at its own size.

        Images go through one by one, since each has its own size, as in the evaluation.

        Raises:
            UserError: of a model that does not segment, or naming an image that cannot be read.
        """
        self.must_be("segment")
        return self._segment(self._decoded(images))

    def detect(self, images: Images) -> Iterator[Objects]:
        """For every image the objects in it.

        Images go through one by one: padded to the size of others they would score otherwise than in the evaluation.

        Raises:
            UserError: of a model that is no detector, or naming an image that cannot be read.
        """
        self.must_be("detect")
        return self._detect(self._decoded(images))

    def _classify(self, images: Iterator[Image.Image], top: int) -> Iterator[list[tuple[str, float]]]:
        transform = held_out_transform(self.config)
        while batch := [transform(image) for image in islice(images, self.batch_size)]:
            with torch.inference_mode():
                scores = self.model(torch.stack(batch).to(self.device)).float().softmax(1).cpu()
            best = scores.topk(min(top, len(self.classes)))
            for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                yield [(self.classes[number], value) for number, value in zip(numbers, values, strict=True)]

    def _segment(self, images: Iterator[Image.Image]) -> Iterator[Tensor]:
        for image in images:
            with torch.inference_mode():
                labels = predict_labels(self.model, to_tensor(image).to(self.device), self.config)
            yield labels[0].cpu()

    def _detect(self, images: Iterator[Image.Image]) -> Iterator[Objects]:
        for image in images:
            with torch.inference_mode():
                found = find_objects(cast(FasterRCNN, self.model), to_tensor(image))
            numbers = found["labels"] - 1  # 0 is the background there
            names = [self.classes[number] for number in numbers.tolist()]
            masks = found["masks"][:, 0] > 0.5 if "masks" in found else None
            yield Objects(found["boxes"], numbers, names, found["scores"], masks)

    def _decoded(self, images: Images) -> Iterator[Image.Image]:
        ahead = 2 * self.batch_size if self.task in (None, "classify") else 4
        return decoded(list_images(images), ahead, self.unreadable)

    def readable(self, paths: Sequence[Path]) -> Iterator[Path]:
        """The files among these that have not been passed over as unreadable, each looked up as it is asked for."""
        return (path for path in paths if path not in (self.unreadable or ()))

    def must_be(self, task: str) -> None:
        """Refuse another task than the model's.

        Raises:
            UserError: that says which model is needed.
        """
        if self.task == task:
            return
        if self.task:
            raise UserError(f"{self.name} was fine-tuned to {self.task}, not to {task}: give a model made for that")
        raise UserError(
            f"{self.name} is a backbone without a head to {task} with: fine-tune it (jobs/finetune.py finetune.task={task} "
            "finetune.student=...), and give the folder `model` of that run"
        )


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_predictor(
    model: str,
    *,
    weights: str = "pretrained",
    input_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
    tracking_uri: str = "",
) -> Predictor:
    """A predictor of a fine-tuned model (folder or MLflow URI), an exported student (the same), or a timm name.

    Args:
        model: what is loaded.
        weights: as in :func:`~pipeline.student.loading.load_student`.
        tracking_uri: of the MLflow store that knows the URI.
        input_size: in pixels, of a backbone or classifier; None: as it was trained, else 224.
        device, batch_size: as in :class:`Predictor`.

    Raises:
        UserError: where there is no such model or device.
    """
    saved = find_model(model, tracking_uri)
    if saved is None:
        loaded = load_student(fetch_student(model, tracking_uri), weights=weights)
        return Predictor(loaded.encoder, model, input_size or loaded.input_size or 224, device, batch_size)
    if input_size:
        saved = _resized(saved, model, input_size)
    return Predictor(saved, model, saved.config.student.input_size, device, batch_size)


def _resized(saved: SavedModel, name: str, side: int) -> SavedModel:
    if saved.kind.name != "classify":
        raise UserError(f"input size: {name} takes images of the size that it was fine-tuned to {saved.kind.name} at")
    student = saved.config.student.model_copy(update={"input_size": side})
    fields: dict[str, Any] = {**vars(saved), "config": saved.config.model_copy(update={"student": student})}
    return SavedModel(**fields)
