"""Predictions of a fine-tuned model as files: JSON for programs, pictures for people, label maps for both.

predictions.json    classify: the likeliest classes of each image; segment: the file of each label map;
                    detect: a list in COCO's results format, whose ids are those of images.json
images.json         detect: `images` and `categories` in COCO's format
labels/             segment: a PNG for each image, with the number of the class of each pixel
pictures/           what was predicted, drawn over the image
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline.downstream.detect.coco import Objects as Drawn
from pipeline.downstream.detect.task import SHOWN, detections, draw_objects
from pipeline.downstream.pictures import caption, palette
from pipeline.downstream.segment.task import overlay
from pipeline.errors import UserError
from pipeline.predict.images import opened
from pipeline.predict.predictor import Objects, Predictor, to_tensor
from pipeline.storage.names import folder_name

PICTURE_SIDE = 512
"""Longest side of the picture of a classified image."""


def write_predictions(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Predict what the model was made for, and write it.

    Args:
        paths: of the images.
        folder: that is written; files of the same names are replaced.

    Returns:
        The files and folders that were written.

    Raises:
        UserError: where the folder cannot be made, or naming an image that cannot be read, unless `predictor.unreadable`
            takes those.
    """
    assert predictor.task is not None
    try:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return _WRITERS[predictor.task](predictor, paths, folder)


def _classes(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    rows = []
    for number, path, best in _each(predictor, paths, predictor.classify([*paths])):
        rows.append({"path": str(path), "top": [{"class": name, "probability": share} for name, share in best]})
        image = opened(path)
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        lines = [f"{name} ({share:.0%})" for name, share in best]
        _save(caption(to_tensor(image) / 255, lines), folder / "pictures" / _name(number, path))
    return [_dump(rows, folder / "predictions.json"), folder / "pictures"]


def _maps(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    (folder / "labels").mkdir(exist_ok=True)
    colours = palette(len(predictor.classes)).ravel().tolist()
    rows = []
    for number, path, labels in _each(predictor, paths, predictor.segment([*paths])):
        file = folder / "labels" / _name(number, path)
        numbers = Image.fromarray(labels.numpy().astype(np.uint8), mode="P")
        numbers.putpalette(colours)
        numbers.save(file)
        picture = overlay(to_tensor(opened(path)), labels, len(predictor.classes))
        _save(picture, folder / "pictures" / file.name)
        rows.append({"path": str(path), "labels": f"labels/{file.name}"})
    described = {"classes": list(predictor.classes), "images": rows}
    return [_dump(described, folder / "predictions.json"), folder / "labels", folder / "pictures"]


def _objects(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(predictor.classes)]
    images, results = [], []
    for number, path, found in _each(predictor, paths, predictor.detect([*paths])):
        image = to_tensor(opened(path))
        size = {"width": image.shape[2], "height": image.shape[1]}
        images.append({"id": number + 1, "file_name": str(path), **size})
        results += coco_results(found, number + 1)
        _save(_drawn(image, found, len(categories)), folder / "pictures" / _name(number, path))
    described = {"images": images, "categories": categories, "annotations": []}
    return [
        _dump(results, folder / "predictions.json"),
        _dump(described, folder / "images.json"),
        folder / "pictures",
    ]


def coco_results(found: Objects, image_id: int) -> list[dict[str, Any]]:
    """Objects in COCO's results format, ready for JSON; category ids are the numbers of the classes from 1."""
    output = {"boxes": found.boxes, "labels": found.labels + 1, "scores": found.scores}
    if found.masks is not None:
        output["masks"] = found.masks[:, None].float()
    results = detections(output, image_id, range(1, int(output["labels"].max()) + 1 if len(found.names) else 1))
    for result in results:
        if "segmentation" in result:
            encoded = result["segmentation"]
            result["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return results


def _drawn(image: Tensor, found: Objects, classes: int) -> Tensor:
    shown = found.scores >= SHOWN
    masks = torch.zeros(0, *image.shape[1:]) if found.masks is None else found.masks[shown]
    names = [f"{name} {score:.2f}" for name, score, kept in zip(found.names, found.scores, shown, strict=True) if kept]
    return draw_objects(image, Drawn(found.boxes[shown], found.labels[shown] + 1, masks), names, classes)


def _each(predictor: Predictor, paths: Sequence[Path], predictions: Iterator[Any]) -> Iterator[tuple[int, Path, Any]]:
    # Predictions first: with one it is known which files before its own were passed over.
    pairs = zip(predictions, predictor.readable(paths), strict=True)
    bar = tqdm(pairs, total=len(paths), unit="image", desc="predict", leave=False)
    for number, (prediction, path) in enumerate(bar):
        yield number, path, prediction


def _name(number: int, path: Path) -> str:
    return f"{number:05d}-{folder_name(path.stem)}.png"


def _save(picture: Tensor, file: Path) -> None:
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)


def _dump(value: Any, file: Path) -> Path:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return file


_WRITERS: dict[str, Callable[[Predictor, Sequence[Path], Path], list[Path]]] = {
    "classify": _classes,
    "segment": _maps,
    "detect": _objects,
}
