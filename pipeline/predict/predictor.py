"""A model ready for images of any size: features of a backbone, results of a fine-tuned model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from pipeline.downstream.classify.task import likeliest
from pipeline.downstream.detect.task import Objects
from pipeline.downstream.saved import SavedModel, find_model
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.geometry import FULL
from pipeline.predict.images import Images, decoded, list_images
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import load_student
from pipeline.student.model import Encoder


class Predictor:
    """A model on a device.

    Args:
        model: an encoder ([B, 3, H, W] float32 RGB in [0, 1] -> [B, C]) or a fine-tuned model; moved to the device.
        name: of the model, for messages.
        input_size: side in pixels to which images are resized for features (bicubic).
        device: of torch; None: a GPU if there is one.
        batch_size: images per forward pass, where all are resized to one size.

    Attributes:
        saved: the fine-tuned model; None for a backbone.
        min_score: smallest score of the objects that a detector gives; None: its own, of which pictures show those from 0.5 on.
        unreadable: reason by file for images that were skipped as unreadable; None, the default: the first one raises.

    Raises:
        UserError: if the device does not exist.
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
        self.saved = model if isinstance(model, SavedModel) else None
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = (model.model if isinstance(model, SavedModel) else model).to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error
        self.encoder = self.saved.encoder if self.saved else self.model
        self.min_score: float | None = None
        self.unreadable: dict[Path, str] | None = None

    @property
    def task(self) -> str | None:
        """Name of the task that the model was fine-tuned for; None for a backbone."""
        return self.saved.task.name if self.saved else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by number; empty for a backbone."""
        return self.saved.classes if self.saved else ()

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """Vectors [N, C] float32 on the CPU, in the order of :func:`~pipeline.predict.images.list_images`.

        Raises:
            UserError: naming an image that cannot be read.
        """
        size = (self.input_size, self.input_size)
        pixels = (crop_and_resize(image, FULL, size, "bicubic") for image in self._decoded(images, 2 * self.batch_size))
        parts = []
        while batch := list(islice(pixels, self.batch_size)):
            stacked = torch.from_numpy(np.stack(batch)).to(self.device)
            parts.append(self.encoder(stacked / 255).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, cast(Encoder, self.encoder).dim)

    def predict(self, images: Images) -> Iterator[Any]:
        """A result for every image, as the `predict` of the model's task returns it.

        Raises:
            UserError: if the model was not fine-tuned for the task, or naming an unreadable image.
        """
        return (result for _, result in self.predict_with_images(images))

    def predict_with_images(self, images: Images) -> Iterator[tuple[Tensor, Any]]:
        """As :meth:`predict`, each result after its image, uint8 [3, H, W]."""
        return self._predict(self._fine_tuned(), images)

    def classify(self, images: Images, top: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Names and probabilities of the `top` likeliest classes of every image, best first; raises as :meth:`predict`."""
        self.check_task("classify")
        return (likeliest(result, self.classes, top) for result in self.predict(images))

    def segment(self, images: Images) -> Iterator[Tensor]:
        """Class number by pixel of every image, int64 [H, W] at the image's own size; raises as :meth:`predict`."""
        self.check_task("segment")
        return self.predict(images)

    def detect(self, images: Images) -> Iterator[Objects]:
        """The objects in every image; raises as :meth:`predict`."""
        self.check_task("detect")
        return self.predict(images)

    def _predict(self, saved: SavedModel, images: Images) -> Iterator[tuple[Tensor, Any]]:
        size = self.batch_size if saved.task.batched else 1
        pixels = map(pil_to_tensor, self._decoded(images, max(4, 2 * size)))
        while batch := list(islice(pixels, size)):
            with torch.inference_mode():
                results = saved.task.predict(self.model, batch, saved.classes)
            if self.min_score is not None:
                results = [result.at_least(self.min_score) for result in results]
            yield from zip(batch, results, strict=True)

    def _decoded(self, images: Images, ahead: int) -> Iterator[Image.Image]:
        return decoded(list_images(images), ahead, self.unreadable)

    def readable(self, paths: Sequence[Path]) -> Iterator[Path]:
        """The files that have not been skipped as unreadable, checked lazily."""
        return (path for path in paths if path not in (self.unreadable or ()))

    def check_task(self, task: str) -> None:
        """Raise a UserError, naming the model that is needed, if this one was not fine-tuned for a task."""
        saved = self._fine_tuned(task)
        if task not in (saved.task.name, saved.task.config.finetune.task):
            raise UserError(f"{self.name} was fine-tuned for {self.task}, not for {task}: name a model made for that")

    def _fine_tuned(self, task: str = "predict") -> SavedModel:
        if self.saved is None:
            asked = "..." if task == "predict" else task
            raise UserError(
                f"{self.name} is a backbone and cannot {task}: fine-tune it (jobs/finetune.py "
                f"finetune.task={asked} finetune.student=...), and name the folder `model` of that run"
            )
        return self.saved


def load_predictor(
    model: str,
    *,
    weights: str = "pretrained",
    input_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
    tracking_uri: str = "",
) -> Predictor:
    """A predictor for a fine-tuned model or an exported student (folder or MLflow URI), or for a timm name.

    Args:
        weights: as in :func:`~pipeline.student.loading.load_student`.
        input_size: in pixels, for a backbone or a task that takes any; None: as it was trained, else 224.
        device, batch_size: as in :class:`Predictor`.
        tracking_uri: MLflow store in which a URI is looked up.

    Raises:
        UserError: if there is no such model or device.
    """
    saved = find_model(model, tracking_uri)
    if saved is None:
        loaded = load_student(fetch_student(model, tracking_uri), weights=weights)
        return Predictor(loaded.encoder, model, input_size or loaded.input_size or 224, device, batch_size)
    task = saved.task
    if input_size:
        if not task.any_input_size:
            raise UserError(
                f"input size: {model} takes only images of the size that it was fine-tuned at ({task.name})"
            )
        student = task.config.student.model_copy(update={"input_size": input_size})
        saved = replace(saved, task=type(task)(task.config.model_copy(update={"student": student})))
    return Predictor(saved, model, saved.task.config.student.input_size, device, batch_size)
