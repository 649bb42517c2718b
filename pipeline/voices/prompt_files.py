"""Masks of prompts as files: those of a detector (`pipeline/predict/files.py`), and pictures with the prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_keypoints

from pipeline.downstream.detect.coco import ObjectTargets
from pipeline.downstream.detect.task import Objects, coco_documents, describe_objects, draw_objects
from pipeline.downstream.pictures import scale_of
from pipeline.predict.images import Images
from pipeline.voices.prompts import NAME, PromptedImage, Prompts

COLOURS = {1: "lime", 0: "red"}
"""Of points on the object and not on it."""


class Prompted:
    """The same prompts for every image.

    Args:
        points: (x, y) or (x, y, label) in pixels of an image; they name one object.
        boxes: (left, top, right, bottom), each of one object. Without points and boxes: everything.

    Attributes:
        count: objects that have been found.
    """

    classes = (NAME,)

    def __init__(
        self, prompts: Prompts, points: Sequence[Sequence[float]] = (), boxes: Sequence[Sequence[float]] = ()
    ) -> None:
        self.prompts, self.boxes = prompts, boxes
        self.points = [(x, y) for x, y, *_ in points]
        self.labels = [int(label[0]) if label else 1 for _, _, *label in points]
        self.count = 0

    def predict_with_images(self, images: Images) -> Iterator[tuple[Tensor, Objects]]:
        """Every image, uint8 [3, H, W], and its objects."""
        for image in self.prompts.embed_all(images):
            found = self._find(image)
            self.count += len(found.scores)
            yield image.pixels, found

    def _find(self, image: PromptedImage) -> Objects:
        if self.points:
            return image.points(self.points, self.labels)
        return image.boxes(self.boxes) if self.boxes else image.everything()

    def readable(self, paths: Sequence[Path]) -> Iterator[Path]:
        """The files that have not been skipped as unreadable, checked lazily."""
        return (path for path in paths if path not in (self.prompts.unreadable or ()))


class PromptFiles:
    """How the objects of :class:`Prompted` are written; see :class:`pipeline.predict.files.Writes`."""

    folders = ("pictures",)

    def __init__(self, prompted: Prompted) -> None:
        self.prompted = prompted

    def draw(self, image: Tensor, result: Objects, classes: Sequence[str]) -> Tensor:
        """The image under every mask in a colour of its own, with the boxes or points that were given."""
        assert result.masks is not None
        given = self.prompted
        boxes = torch.tensor([*map(list, given.boxes)], dtype=torch.float32).reshape(-1, 4)
        order = result.masks.sum(dim=(1, 2)).argsort(descending=True)  # small masks over large ones
        order = torch.arange(len(order)) if given.boxes else order
        numbers = torch.arange(1, len(order) + 1)
        names = [f"{score:.2f}" for score in result.scores] if given.boxes else []
        picture = draw_objects(image, ObjectTargets(boxes, numbers, result.masks[order]), names)
        factor = scale_of(image.shape[-2:])
        for (x, y), label in zip(given.points, given.labels, strict=True):
            place = torch.tensor([[[x, y]]]) * factor
            picture = draw_keypoints(picture, place, colors=COLOURS[label], radius=4)
        return picture

    def describe(
        self, image: Tensor, result: Objects, classes: Sequence[str], folder: Path, stem: str
    ) -> dict[str, Any]:
        """The size of the image and its objects in COCO's results format."""
        return describe_objects(image, result, classes)

    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
        """`predictions.json` and `images.json`, as of a detector."""
        return coco_documents(rows, classes)
