"""Detection and instance segmentation: scale augmentation, Mask R-CNN's losses, box and mask AP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks

from pipeline.downstream.base import Column, DownstreamTask, Report, Split, device_of, evenly
from pipeline.downstream.detect.coco import CocoImages, ObjectTargets, SceneObjects, open_objects
from pipeline.downstream.detect.coco_eval import NOTHING, Kind, average_precision, coco_index, in_words
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.detect.mask_rcnn import build_detector
from pipeline.downstream.images import read_rows
from pipeline.downstream.lettering import draw_boxes, side_by_side
from pipeline.downstream.pictures import enlarge, palette, scale_of
from pipeline.downstream.sampling import Draw, prepare, seeded
from pipeline.student.model import Encoder
from pipeline.training.worker import Worker

SHOWN = 0.5
"""Smallest score of a detection that is drawn, unless another is asked for."""

Examples = CocoImages | SceneObjects


class ObjectsBatch(NamedTuple):
    """images uint8 [3, H_i, W_i] RGB of any sizes; targets: boxes, labels and masks, as torchvision's detectors take."""

    keys: list[str]
    images: list[Tensor]
    targets: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Objects:
    """The n objects that a detector found in one image, best first.

    Attributes:
        boxes: float32 [n, 4]: left, top, right, bottom in pixels of the image.
        labels: int64 [n], class numbers from 0; `names` are those of the classes.
        scores: float32 [n] in [0, 1].
        masks: bool [n, H, W]; None from a detector without masks.
        drawn: smallest score that is drawn.
    """

    boxes: Tensor
    labels: Tensor
    names: list[str]
    scores: Tensor
    masks: Tensor | None
    drawn: float = SHOWN

    def at_least(self, score: float) -> "Objects":
        """Those of at least this score, which are all drawn."""
        kept = self.scores >= score
        names = [name for name, is_kept in zip(self.names, kept.tolist(), strict=True) if is_kept]
        masks = None if self.masks is None else self.masks[kept]
        return Objects(self.boxes[kept], self.labels[kept], names, self.scores[kept], masks, score)


class Detection(DownstreamTask[DetectConfig]):
    """Object detection, with instance masks unless `detect.masks` is false."""

    name, headline, section = "detect", "box/AP", DetectConfig
    locations = ("train_annotations", "val_annotations")
    columns = (
        Column("box/AP", "box_ap", "box AP", factor=100.0, missing=NOTHING),
        Column("mask/AP", "mask_ap", "mask AP", factor=100.0, missing=NOTHING),
    )
    min_classes = 1

    def open(self, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """Images with objects."""
        return open_objects(self.config, self.settings, split)

    def build(self, encoder: Encoder, classes: Sequence[str]) -> FasterRCNN:
        """A detector on a hierarchical backbone."""
        return build_detector(encoder, len(classes), self.settings)

    def image_size(self) -> tuple[int, int]:
        """Images of any sides, padded to multiples of 32: the smallest that is not square."""
        side = -(-self.settings.sizes[0] // 32) * 32
        return side, side + 32

    def saved_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The architecture, and the image sizes of its evaluation."""
        kept = self.settings.model_dump(include={"masks", "anchor", "channels", "max_size"})
        return {"detect": {**kept, "sizes": self.settings.sizes[-1:]}}

    def batch(self, examples: Examples, draws: Sequence[Draw]) -> ObjectsBatch:
        """Images resized to a random short side and flipped, each by its own seed."""
        settings = self.settings
        augment = v2.Compose([_ShortestSize(settings.sizes, settings.max_size), v2.RandomHorizontalFlip()])
        images, targets = [], []
        found = read_rows(examples, [draw.row for draw in draws])
        for draw, (image, objects) in zip(draws, found, strict=True):
            with seeded(self.config.seed, draw.number):
                image, target = augment(tv_tensors.Image(image), _wrapped(objects, image, settings.masks))
            images.append(image.as_subclass(Tensor))
            targets.append({name: value.as_subclass(Tensor) for name, value in target.items()})
        return ObjectsBatch([examples.key(draw.row) for draw in draws], images, targets)

    def loss(self, module: nn.Module, batch: ObjectsBatch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the detector's losses: region proposals, classes, boxes and masks."""
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets
        ]
        losses: dict[str, Tensor] = module(images, targets)
        parts = {name.removeprefix("loss_"): loss.detach() for name, loss in losses.items()}
        return torch.stack([loss.float() for loss in losses.values()]).sum(), parts

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, examples: Examples, worker: Worker) -> Report:
        """Box and mask AP in [0, 1], as the COCO API prints them, on rank 0."""
        detector = cast(FasterRCNN, model)
        detector.transform.min_size = (self.settings.sizes[-1],)
        detector.transform.max_size = self.settings.max_size
        found: list[dict[str, Any]] = []
        rows = worker.own_rows(len(examples))
        images = prepare(examples.read, rows, self.config.finetune.data_workers)
        for row, (image, _) in zip(rows, images, strict=True):
            objects = self._find(detector, image, examples.classes)
            found += coco_results(objects, examples.image_id(row), examples.category_ids)
        results = worker.all_gather_objects(found)
        if worker.rank:
            return Report({})
        masks = self.settings.masks and detector.roi_heads.has_mask()
        metrics, table = detection_metrics(examples, results, masks=masks)
        return Report(metrics, table, pictures=self._pictures(detector, examples))

    def in_words(self, metric: str, value: float) -> str:
        """A number of the COCO API."""
        return in_words(metric, value)

    def charts(self, metrics: Mapping[str, float]) -> dict[str, list[str]]:
        """Precision and recall, of boxes and of masks, each with all that can be measured."""
        found: dict[str, list[str]] = {}
        for name, value in metrics.items():
            if value != NOTHING:
                kind, number = name.split("/")
                found.setdefault(f"{kind}/{number[:2]}", []).append(name)
        return found

    def predict(self, model: nn.Module, images: Sequence[Tensor], classes: Sequence[str]) -> list[Objects]:
        """The objects in each image, one by one: padding to the size of others would change the scores."""
        return [self._find(model, image, classes) for image in images]

    def draw(self, image: Tensor, result: Objects, classes: Sequence[str]) -> Tensor:
        """The image under masks and boxes of the objects that score at least `result.drawn`."""
        shown = result.scores >= result.drawn
        masks = torch.zeros(0, *image.shape[1:]) if result.masks is None else result.masks[shown]
        scored = zip(result.names, result.scores, shown, strict=True)
        names = [f"{name} {score:.2f}" for name, score, kept in scored if kept]
        return draw_objects(image, ObjectTargets(result.boxes[shown], result.labels[shown] + 1, masks), names)

    def describe(
        self, image: Tensor, result: Objects, classes: Sequence[str], folder: Path, stem: str
    ) -> dict[str, Any]:
        """As :func:`describe_objects`."""
        return describe_objects(image, result, classes)

    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
        """As :func:`coco_documents`."""
        return coco_documents(rows, classes)

    def _find(self, model: nn.Module, image: Tensor, classes: Sequence[str]) -> Objects:
        height, width = image.shape[-2:]
        if max(height, width) >= self.settings.max_size * min(height, width):  # the short side would be under a pixel
            masks = torch.zeros(0, height, width, dtype=torch.bool) if self.settings.masks else None
            return Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], torch.zeros(0), masks)
        (output,) = model([image.to(device_of(model)).float() / 255])
        output = {name: value.cpu() for name, value in output.items()}
        labels = output["labels"] - 1  # the detector's 0 is the background
        names = [classes[number] for number in labels.tolist()]
        masks = output["masks"][:, 0] > 0.5 if "masks" in output else None
        return Objects(output["boxes"], labels, names, output["scores"], masks)

    def _pictures(self, detector: FasterRCNN, examples: Examples) -> dict[str, Tensor]:
        """Ground truth next to the detections that score at least `SHOWN`."""
        pictures: dict[str, Tensor] = {}
        for row in evenly(len(examples), self.config.finetune.pictures):
            image, objects = examples.read(row)
            truth = draw_objects(image, objects, [examples.classes[label - 1] for label in objects.labels])
            found = self.draw(image, self._find(detector, image, examples.classes), examples.classes)
            pictures[examples.key(row)] = side_by_side({"annotated": truth, f"predicted (score ≥ {SHOWN})": found})
        return pictures


class _ShortestSize(v2.RandomShortestSize):
    """Keeps at least one pixel of an image whose long side is more than `max_size` times its short one."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params: dict[str, Any] = super().make_params(flat_inputs)
        return {**params, "size": tuple(max(1, side) for side in params["size"])}


def _wrapped(objects: ObjectTargets, image: Tensor, masks: bool) -> dict[str, Tensor]:
    size = (int(image.shape[-2]), int(image.shape[-1]))
    boxes = tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=size)
    target: dict[str, Tensor] = {"boxes": boxes, "labels": objects.labels}
    return {**target, "masks": tv_tensors.Mask(objects.masks)} if masks else target


def coco_results(objects: Objects, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The objects of one image in COCO's results format; `category_ids` by number of the class from 0."""
    sides = objects.boxes.clone()
    sides[:, 2:] -= sides[:, :2]
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "score": score, "bbox": box}
        for label, score, box in zip(objects.labels.tolist(), objects.scores.tolist(), sides.tolist(), strict=True)
    ]
    if objects.masks is not None:
        for result, mask in zip(results, objects.masks, strict=True):
            result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return results


def describe_objects(image: Tensor, result: Objects, classes: Sequence[str]) -> dict[str, Any]:
    """The size of an image and its objects, JSON-ready; masks are COCO's compressed run lengths."""
    objects = coco_results(result, 0, range(1, len(classes) + 1))
    for entry in objects:
        if "segmentation" in entry:
            entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
    return {"width": image.shape[2], "height": image.shape[1], "objects": objects}


def coco_documents(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Files by name, of rows of :func:`describe_objects` with their `path`.

    Returns:
        `predictions.json` in COCO's results format, whose ids are those of `images.json`, in COCO's annotation format.
    """
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        images.append({"id": number, "file_name": row["path"], "width": row["width"], "height": row["height"]})
        results += [{**entry, "image_id": number} for entry in row["objects"]]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    described = {"images": images, "categories": categories, "annotations": []}
    return {"predictions.json": results, "images.json": described}


def detection_metrics(
    examples: Examples, results: Sequence[Mapping[str, Any]], *, masks: bool
) -> tuple[dict[str, float], list[dict[str, str | float]]]:
    """The twelve numbers for boxes (`box/AP` ...) and masks (`mask/AP` ...), and AP by class."""
    truth = coco_index(examples.truth())
    kinds: dict[str, Kind] = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
    scores = {name: average_precision(truth, results, kind) for name, kind in kinds.items()}
    metrics = {f"{name}/{number}": value for name, score in scores.items() for number, value in score.numbers.items()}
    table: list[dict[str, str | float]] = [
        {
            "class": examples.classes[place],
            "objects": len(truth.getAnnIds(catIds=[category], iscrowd=False)),
            **{f"{name} AP": _cell(score.per_category[category]) for name, score in scores.items()},
        }
        for place, category in enumerate(examples.category_ids)
    ]
    return metrics, table


def _cell(value: float) -> str | float:
    return "" if value == NOTHING else round(value, 4)


def draw_objects(image: Tensor, objects: ObjectTargets, names: list[str]) -> Tensor:
    """An image uint8 [3, H, W], enlarged where it is small, with masks and named boxes over it."""
    canvas, factor = enlarge(image), scale_of(image.shape[-2:])
    numbers = objects.labels.numpy()
    colours = [(red, green, blue) for red, green, blue in palette(numbers.max(initial=0))[numbers - 1].tolist()]
    if len(objects.masks):
        masks = objects.masks.bool().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colours)
    if len(objects.boxes):
        canvas = draw_boxes(canvas, objects.boxes * factor, names, colours)
    return canvas
