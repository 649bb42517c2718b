"""Eight small drawings with class folders, label maps and COCO annotations: discs and squares of a colour each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("square", "disc")
SIDE = 48


def draw(number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Image uint8 [S, S, 3], mask bool [S, S] and class of one drawing."""
    rng = np.random.default_rng(number)
    kind = number % 2
    y, x = np.mgrid[:SIDE, :SIDE]
    cy, cx, radius = rng.integers(16, 32), rng.integers(16, 32), rng.integers(9, 14)
    inside = (np.abs(y - cy) < radius) & (np.abs(x - cx) < radius)
    if kind:
        inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    image = rng.integers(90, 110, (SIDE, SIDE, 3), dtype=np.uint8)
    image[inside] = ((220, 40, 40), (40, 60, 230))[kind]
    return image, inside, kind


def box(mask: np.ndarray) -> list[float]:
    """Left, top, width and height of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    sides = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return [float(value) for value in sides]


def run_lengths(mask: np.ndarray) -> dict[str, object]:
    """COCO's uncompressed run lengths of a mask, by column, the first run of zeros."""
    flat = mask.T.flatten().astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0, append=len(flat)).tolist()}


def write_set(folder: Path, count: int = 8) -> None:
    """`classes/<class>/`, `images/train` beside `masks/train`, `classes.txt`, and `annotations/instances_train.json`."""
    images, annotations = [], []
    for part in ("images/train", "masks/train", "annotations", *(f"classes/{name}" for name in CLASSES)):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        image, mask, kind = draw(number)
        name = f"drawing{number}"
        Image.fromarray(image).save(folder / f"images/train/{name}.png")
        Image.fromarray(image).save(folder / f"classes/{CLASSES[kind]}/{name}.png")
        Image.fromarray((mask * (kind + 1)).astype(np.uint8)).save(folder / f"masks/train/{name}.png")
        images.append({"id": number + 1, "file_name": f"{name}.png", "width": SIDE, "height": SIDE})
        annotations.append(
            {
                "id": number + 1,
                "image_id": number + 1,
                "category_id": 7 + kind,
                "bbox": box(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            }
        )
    categories = [{"id": 7 + kind, "name": name} for kind, name in enumerate(CLASSES)]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations/instances_train.json").write_text(json.dumps(dataset))
    (folder / "classes.txt").write_text("background\nsquare\ndisc\n")


def locations(folder: Path, task: str) -> list[str]:
    """Overrides that train on the set and evaluate on the equal one in `held-out`."""
    images = "classes" if task == "classify" else "images/train"
    annotations = "annotations/instances_train.json"
    found = [f"segment.classes={folder}/classes.txt"]
    for split, part in {"train": folder, "val": folder / "held-out"}.items():
        found += [f"data.{split}={part}/{images}", f"detect.{split}_annotations={part}/{annotations}"]
    return found
