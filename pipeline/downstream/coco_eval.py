"""Average precision by the COCO API (pycocotools), with all twelve of its numbers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.errors import UserError

Kind = Literal["bbox", "segm"]

_SIZES = ("small", "medium", "large")
NUMBERS: tuple[str, ...] = ("AP", "AP50", "AP75", *(f"AP_{size}" for size in _SIZES))
NUMBERS += ("AR1", "AR10", "AR100", *(f"AR_{size}" for size in _SIZES))
"""Names of the twelve numbers, in the COCO API's order."""


class Precision(NamedTuple):
    """The twelve numbers by name, and AP by category id; in [0, 1] as the API prints them, -1 where nothing counts."""

    numbers: dict[str, float]
    per_category: dict[int, float]


def coco_index(dataset: Mapping[str, Any]) -> COCO:
    """The API's index of annotations."""
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = dict(dataset)
        index.createIndex()
    return index


def average_precision(truth: COCO, results: Sequence[Mapping[str, Any]], kind: Kind) -> Precision:
    """Box or mask AP of detections in COCO's results format."""
    # With boxes beside masks the API would take a mask's area for that of its box.
    unwanted = "bbox" if kind == "segm" else "segmentation"
    detections = [{name: value for name, value in result.items() if name != unwanted} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(detections) if detections else _nothing(truth)
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # every size, 100 detections
    per_category = {}
    for place, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, place]
        values = values[values > -1]
        per_category[int(category)] = float(np.mean(values)) if len(values) else -1.0
    return Precision(dict(zip(NUMBERS, map(float, evaluation.stats), strict=True)), per_category)


def _nothing(truth: COCO) -> COCO:
    return coco_index({"images": truth.dataset["images"], "categories": truth.dataset["categories"], "annotations": []})


def evaluate_files(annotations: Path, results: Path) -> dict[Kind, Precision]:
    """Score a results file: boxes where its entries hold `bbox`, masks where they hold `segmentation`.

    Raises:
        UserError: where a file is not in COCO's format, or they do not belong together.
    """
    dataset, detections = read_json(annotations), read_json(results)
    if not isinstance(dataset, dict) or not {"images", "annotations", "categories"} <= set(dataset):
        raise UserError(f"{annotations}: no COCO annotations: needs images, annotations and categories")
    if not isinstance(detections, list) or not all(isinstance(entry, dict) for entry in detections):
        raise UserError(f"{results}: no COCO results: a list of detections is needed")
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
    truth = coco_index(dataset)
    return {kind: average_precision(truth, detections, kind) for kind in kinds or ["bbox"]}


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: where it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
