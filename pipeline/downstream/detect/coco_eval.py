"""Average precision by the COCO API (pycocotools), with all twelve of its numbers."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.downstream.detect.records import match_results, read_annotations, read_results

Kind = Literal["bbox", "segm"]

_SIZES = ("small", "medium", "large")
NUMBERS: tuple[str, ...] = ("AP", "AP50", "AP75", *(f"AP_{size}" for size in _SIZES))
NUMBERS += ("AR1", "AR10", "AR100", *(f"AR_{size}" for size in _SIZES))
"""Names of the twelve numbers, in the COCO API's order."""
NOTHING = -1.0
"""The COCO API's number where there is no object to find."""


class Precision(NamedTuple):
    """The twelve numbers by name, and AP by category id: in [0, 1], or -1 without ground truth, as the API prints them."""

    numbers: dict[str, float]
    per_category: dict[int, float]


def coco_index(dataset: Mapping[str, Any]) -> COCO:
    """The API's index of copied annotations, with crowd flags and areas filled in, and ids from 1 (0 means no match)."""
    annotations = [{**entry, "id": row} for row, entry in enumerate(dataset["annotations"], start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = {**dataset, "annotations": annotations}
        index.createIndex()
    for entry in annotations:
        entry["iscrowd"] = int(entry.get("iscrowd") or 0)
        if entry.get("area") is None:
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
    means = np.ma.masked_equal(precision, NOTHING).mean(axis=(0, 1)).filled(NOTHING).tolist()
    per_category = dict(zip(map(int, evaluation.params.catIds), means, strict=True))
    return Precision(dict(zip(NUMBERS, map(float, evaluation.stats), strict=True)), per_category)


def read_files(annotations: str | Path, results: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read annotations and the results that are compared with them.

    Raises:
        UserError: if a file is not in COCO's format, or they do not belong together.
    """
    detections = read_results(results)
    masks = f", which {results} is compared with" if detections and "segmentation" in detections[0] else None
    dataset = read_annotations(annotations, masks=masks)
    match_results(results, detections, dataset, annotations)
    return dataset, detections


def score(dataset: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[Kind, Precision]:
    """The scores of what :func:`read_files` has read: of boxes if detections hold `bbox`, of masks if `segmentation`."""
    shapes: tuple[tuple[str, Kind], ...] = (("bbox", "bbox"), ("segmentation", "segm"))
    truth = coco_index(dataset)
    kinds = [kind for field, kind in shapes if (field in detections[0] if detections else kind == "bbox")]
    return {kind: average_precision(truth, detections, kind) for kind in kinds}


def in_words(number: str, value: float) -> str:
    """One of the twelve numbers for people: the COCO API's -1 means that no object can be found."""
    if value != NOTHING:
        return f"{value:.3f}"
    return "no objects of that size" if number.endswith(_SIZES) else "no objects"
