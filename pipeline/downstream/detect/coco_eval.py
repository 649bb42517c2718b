"""Average precision by the COCO API (pycocotools), with all twelve of its numbers."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.errors import UserError

Kind = Literal["bbox", "segm"]

_SIZES = ("small", "medium", "large")
NUMBERS: tuple[str, ...] = ("AP", "AP50", "AP75", *(f"AP_{size}" for size in _SIZES))
NUMBERS += ("AR1", "AR10", "AR100", *(f"AR_{size}" for size in _SIZES))
"""Names of the twelve numbers, in the COCO API's order."""


class Precision(NamedTuple):
    """The twelve numbers by name, and AP by category id: in [0, 1], or -1 without ground truth, as the API prints them."""

    numbers: dict[str, float]
    per_category: dict[int, float]


def coco_index(dataset: Mapping[str, Any]) -> COCO:
    """The API's index of copied annotations, with crowd flags and areas filled in, and ids from 1 (0 means no match)."""
    annotations = [{"iscrowd": 0, **entry, "id": row} for row, entry in enumerate(dataset["annotations"], start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = {**dataset, "annotations": annotations}
        index.createIndex()
    for entry in annotations:
        if "area" not in entry:
            shape = entry.get("segmentation")
            entry["area"] = float(rle.area(index.annToRLE(entry))) if shape else entry["bbox"][2] * entry["bbox"][3]
    return index


def average_precision(truth: COCO, results: Sequence[Mapping[str, Any]], kind: Kind) -> Precision:
    """Box or mask AP of detections in COCO's results format."""
    # Given both, the API would use the area of the box for the mask.
    unwanted = "bbox" if kind == "segm" else "segmentation"
    detections = [{name: value for name, value in result.items() if name != unwanted} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(detections) if detections else coco_index({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # every size, 100 detections
    means = np.ma.masked_equal(precision, -1).mean(axis=(0, 1)).filled(-1.0).tolist()
    per_category = dict(zip(map(int, evaluation.params.catIds), means, strict=True))
    return Precision(dict(zip(NUMBERS, map(float, evaluation.stats), strict=True)), per_category)


def evaluate_files(annotations: Path, results: Path) -> dict[Kind, Precision]:
    """Score a results file: boxes where its entries hold `bbox`, masks where they hold `segmentation`.

    Raises:
        UserError: if a file is not in COCO's format, or they do not belong together.
    """
    dataset, detections = read_annotations(annotations, ("width", "height")), read_json(results)
    if not isinstance(detections, list) or not all(isinstance(entry, dict) for entry in detections):
        raise UserError(f"{results}: not COCO results: expected a list of detections")
    images, categories = ({item["id"] for item in dataset[part]} for part in ("images", "categories"))
    shapes: tuple[tuple[str, Kind], ...] = (("bbox", "bbox"), ("segmentation", "segm"))
    kinds = [kind for field, kind in shapes if detections and field in detections[0]]
    fields = [field for field, kind in shapes if kind in kinds]
    for number, entry in enumerate(detections):
        lacking = [name for name in ("image_id", "category_id", "score", *fields) if name not in entry]
        if lacking or not kinds:
            raise UserError(f"{results}: detection {number} has no {(lacking or ['bbox or segmentation'])[0]}")
        if entry["image_id"] not in images or entry["category_id"] not in categories:
            raise UserError(
                f"{results}: detection {number} is of image {entry['image_id']}, category {entry['category_id']}, "
                f"which {annotations} does not have"
            )
    for number, entry in enumerate(dataset["annotations"], start=1):
        if lacking := [name for name in fields or ["bbox"] if not entry.get(name)]:
            raise UserError(
                f"{annotations}: annotation {entry.get('id', number)} has no {lacking[0]}, which {results} is compared with"
            )
    truth = coco_index(dataset)
    return {kind: average_precision(truth, detections, kind) for kind in kinds or ["bbox"]}


def read_annotations(path: Path, image_fields: Sequence[str]) -> dict[str, Any]:
    """Read a file in COCO's format whose images, categories and annotations refer to each other.

    Args:
        image_fields: fields that every image must have, other than its id.

    Raises:
        UserError: naming the file and the first entry that does not fit.
    """
    dataset = read_json(path)
    if not isinstance(dataset, dict) or not {"images", "annotations", "categories"} <= set(dataset):
        raise UserError(f"{path}: not COCO annotations: expected images, annotations and categories")
    images = _by_id(dataset["images"], image_fields, f"{path}: image")
    categories = _by_id(dataset["categories"], ("name",), f"{path}: category")
    for number, entry in enumerate(dataset["annotations"], start=1):
        where = f"{path}: annotation {entry.get('id', number)}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if image not in images:
            raise UserError(f"{where} is of image {image}, which is not listed")
        if category not in categories:
            raise UserError(
                f"{where} ({images[image].get('file_name', image)}) has category {category}, which is not listed"
            )
    return dataset


def _by_id(entries: Sequence[Mapping[str, Any]], fields: Sequence[str], what: str) -> dict[int, Mapping[str, Any]]:
    """Entries by id, which must be unique whole numbers; every entry must have these fields."""
    found: dict[int, Mapping[str, Any]] = {}
    for entry in entries:
        where = f"{what} {entry.get('file_name') or entry.get('name') or entry}"
        if lacking := [name for name in ("id", *fields) if name not in entry]:
            raise UserError(f"{where} has no {lacking[0]}")
        if not isinstance(entry["id"], int):
            raise UserError(f"{where} has id {entry['id']!r}, which must be a whole number")
        if entry["id"] in found:
            raise UserError(f"{where} repeats id {entry['id']}")
        found[entry["id"]] = entry
    return found


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
