"""Detection and instance segmentation: scale augmentation, Mask R-CNN's losses, box and mask AP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from pipeline.downstream.base import Downstream, Report, Split, device_of, evenly
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.detect.coco import CocoImages, Objects, SceneObjects, open_objects
from pipeline.downstream.detect.coco_eval import Kind, average_precision, coco_index
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.detect.mask_rcnn import build_detector
from pipeline.downstream.pictures import enlarge, palette, scale_of
from pipeline.downstream.sampling import Draw, prepare, seeded
from pipeline.student.model import Encoder
from pipeline.training.worker import Worker

SHOWN = 0.5
"""Least score of a detection that is drawn."""

Examples = CocoImages | SceneObjects


class ObjectsBatch(NamedTuple):
    """images uint8 [3, H_i, W_i] RGB of any sizes; targets: boxes, labels and masks, as torchvision's detectors take."""

    keys: list[str]
    images: list[Tensor]
    targets: list[dict[str, Tensor]]


class Detection(Downstream):
    """Object detection, with instance masks unless `detect.masks` is false."""

    name, headline, least_classes = "detect", "box/AP", 1

    def open(self, config: FinetuneJobConfig, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """Images with objects."""
        return open_objects(config, split)

    def build(self, encoder: Encoder, classes: Sequence[str], config: FinetuneJobConfig) -> FasterRCNN:
        """A hierarchical backbone is needed."""
        return build_detector(encoder, len(classes), config.section(DetectConfig))

    def image_size(self, config: FinetuneJobConfig) -> tuple[int, int]:
        """Images of any sides, padded to multiples of 32: the smallest that is not square."""
        side = -(-config.section(DetectConfig).sizes[0] // 32) * 32
        return side, side + 32

    def settings(self, config: FinetuneJobConfig) -> Mapping[str, Mapping[str, Any]]:
        """What decides the architecture, and the size of the images that it was made for."""
        chosen = config.section(DetectConfig)
        kept = chosen.model_dump(include={"masks", "anchor", "channels", "max_size"})
        return {"detect": {**kept, "sizes": chosen.sizes[-1:]}}

    def batch(self, examples: Examples, config: FinetuneJobConfig, draws: Sequence[Draw]) -> ObjectsBatch:
        """Images resized to a random short side and flipped, each by its own seed."""
        augment = v2.Compose(
            [
                v2.RandomShortestSize(config.section(DetectConfig).sizes, config.section(DetectConfig).max_size),
                v2.RandomHorizontalFlip(),
            ]
        )
        images, targets = [], []
        for draw in draws:
            image, objects = examples.read(draw.row)
            with seeded(config.seed, draw.number):
                image, target = augment(
                    tv_tensors.Image(image), _wrapped(objects, image, config.section(DetectConfig).masks)
                )
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
    def evaluate(self, model: nn.Module, examples: Examples, config: FinetuneJobConfig, worker: Worker) -> Report:
        """Box and mask AP in [0, 1], as the COCO API prints them, on rank 0."""
        detector = cast(FasterRCNN, model)
        detector.transform.min_size = (config.section(DetectConfig).sizes[-1],)
        detector.transform.max_size = config.section(DetectConfig).max_size
        found: list[dict[str, Any]] = []
        rows = worker.own_rows(len(examples))
        for row, (image, _) in zip(rows, prepare(examples.read, rows, config.finetune.data_workers), strict=True):
            found += detections(find_objects(detector, image), examples.image_id(row), examples.category_ids)
        results = worker.all_gather_objects(found)
        if worker.rank:
            return Report({})
        masks = config.section(DetectConfig).masks and detector.roi_heads.has_mask()
        metrics, table = detection_metrics(examples, results, masks=masks)
        return Report(metrics, table, pictures=_pictures(detector, examples, config))


def _wrapped(objects: Objects, image: Tensor, masks: bool) -> dict[str, Tensor]:
    size = (int(image.shape[-2]), int(image.shape[-1]))
    boxes = tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=size)
    target: dict[str, Tensor] = {"boxes": boxes, "labels": objects.labels}
    return {**target, "masks": tv_tensors.Mask(objects.masks)} if masks else target


def find_objects(detector: FasterRCNN, image: Tensor) -> dict[str, Tensor]:
    """A detector's output for an image uint8 [3, H, W], on the CPU: boxes, labels from 1, scores, masks [n, 1, H, W]."""
    (output,) = detector([image.to(device_of(detector)).float() / 255])
    return {name: value.cpu() for name, value in output.items()}


def detections(output: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """A detector's output for one image in COCO's results format.

    Args:
        output: boxes [n, 4], labels [n], scores [n] and, with masks, their probabilities [n, 1, H, W].
        category_ids: by label - 1.
    """
    sides = output["boxes"].clone()
    sides[:, 2:] -= sides[:, :2]
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, "bbox": box}
        for label, score, box in zip(output["labels"].tolist(), output["scores"].tolist(), sides.tolist(), strict=True)
    ]
    for result, mask in zip(results, output.get("masks", ()), strict=False):
        result["segmentation"] = rle.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
    return results


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
            **{f"{name} AP": round(score.per_category[category], 4) for name, score in scores.items()},
        }
        for place, category in enumerate(examples.category_ids)
    ]
    return metrics, table


def _pictures(detector: FasterRCNN, examples: Examples, config: FinetuneJobConfig) -> dict[str, Tensor]:
    """Ground truth beside the detections that score at least `SHOWN`."""
    pictures: dict[str, Tensor] = {}
    for row in evenly(len(examples), config.finetune.pictures):
        image, objects = examples.read(row)
        output = find_objects(detector, image)
        shown = output["scores"] >= SHOWN
        labels = output["labels"][shown]
        masks = output["masks"][shown, 0] > 0.5 if "masks" in output else torch.zeros(0, *image.shape[1:])
        names = [f"{examples.classes[n - 1]} {s:.2f}" for n, s in zip(labels, output["scores"][shown], strict=True)]
        truth = [examples.classes[label - 1] for label in objects.labels]
        sides = [
            draw_objects(image, Objects(*objects), truth, len(examples.classes)),
            draw_objects(image, Objects(output["boxes"][shown], labels, masks), names, len(examples.classes)),
        ]
        pictures[examples.key(row)] = torch.cat(sides, dim=2)
    return pictures


def draw_objects(image: Tensor, objects: Objects, names: list[str], classes: int) -> Tensor:
    """An image uint8 [3, H, W], enlarged where it is small, with masks and named boxes over it."""
    canvas, factor = enlarge(image), scale_of(image.shape[-2:])
    colours = [tuple(colour) for colour in palette(classes)[objects.labels.numpy() - 1].tolist()]
    if len(objects.masks):
        masks = objects.masks.bool().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colours)
    if len(objects.boxes):
        canvas = draw_bounding_boxes(canvas, objects.boxes * factor, names, colors=colours, width=2)
    return canvas
