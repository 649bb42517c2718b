"""Images with boxes and instance masks: COCO-format annotations, or generated scenes."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from pipeline.downstream.base import Split
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.detect.records import read_annotations
from pipeline.downstream.detect.shapes import encoded
from pipeline.downstream.images import Scenes, check_rows, read_pixels, size_on_disk, split_location
from pipeline.errors import UserError
from pipeline.sources.locations import SAMPLES, absolute, below
from pipeline.storage.files import exists, is_folder
from pipeline.storage.remote import is_web


class ObjectTargets(NamedTuple):
    """boxes float32 [n, 4] (left, top, right, bottom) in pixels; labels int64 [n] from 1 on; masks uint8 [n, H, W]."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class CocoImages:
    """Image files with COCO-format annotations.

    For training, boxes are clipped to the image; crowd regions, boxes of less than a pixel, and images without a usable box
    are dropped. For evaluation everything stays as written: the COCO API handles it.

    Args:
        images: folder that `file_name` refers to, by local path or URI.
        masks: whether every object must have a mask.

    Raises:
        UserError: naming the first entry of the file that is wrong.
    """

    block = 1

    def __init__(self, images: str | Path, annotations: str | Path, *, masks: bool, training: bool) -> None:
        self.location, self.annotations, self.with_masks = str(images), annotations, masks
        remedy = "; detect.masks=false trains only boxes" if masks else None
        dataset = read_annotations(annotations, file_names=True, masks=remedy)
        categories = sorted((entry["id"], entry["name"]) for entry in dataset["categories"])
        self.classes = tuple(name for _, name in categories)
        self.category_ids = [number for number, _ in categories]
        self.passed_over: Counter[str] = Counter()
        usable = self._usable_objects(dataset)
        self.images = [image for image in dataset["images"] if not training or usable[image["id"]]]
        self.passed_over["empty"] = len(dataset["images"]) - len(self.images)
        # Text, not objects: forked processes share memory only while no reference count in it changes.
        self.objects = [json.dumps(usable[image["id"]]).encode() for image in self.images]
        self.dataset = None if training else dataset
        if not self.images:
            lacking = "no image has an object to learn from" if training else "lists no images"
            raise UserError(f"{annotations}: {lacking}")

    def _usable_objects(self, dataset: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
        """Usable objects by image id."""
        images = {image["id"]: image for image in dataset["images"]}
        usable: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for entry in dataset["annotations"]:
            if (box := self._usable_box(entry, images[entry["image_id"]])) is not None:
                mask = entry["segmentation"] if self.with_masks else None
                usable[entry["image_id"]].append({"box": box, "category": entry["category_id"], "mask": mask})
        return usable

    def _usable_box(self, entry: Mapping[str, Any], image: Mapping[str, Any]) -> list[float] | None:
        if entry.get("iscrowd"):
            self.passed_over["crowd"] += 1
            return None
        left, top, width, height = entry["bbox"]
        right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
        box = [max(left, 0.0), max(top, 0.0), right, bottom]
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            self.passed_over["tiny"] += 1
            return None
        self.passed_over["cut"] += left < -1 or top < -1 or left + width > right + 1 or top + height > bottom + 1
        return box

    def __len__(self) -> int:
        return len(self.images)

    def key(self, row: int) -> str:
        """File name."""
        return str(self.images[row]["file_name"])

    def image_id(self, row: int) -> int:
        """COCO's id of an image."""
        return int(self.images[row]["id"])

    def check(self) -> list[str]:
        """Every image must be there and have the size that the annotations give."""
        check_rows(self._check_row, len(self))
        notes = {
            "cut": "boxes reach beyond their image and are cut",
            "tiny": "boxes of less than a pixel are left out",
            "crowd": "crowd regions are not learned",
            "empty": "images without an object are left out",
        }
        counts = {} if self.dataset is not None else self.passed_over
        return [f"{counts[name]} {note}" for name, note in notes.items() if counts.get(name)]

    def _check_row(self, row: int) -> None:
        image = self.images[row]
        path = below(self.location, image["file_name"])
        try:
            found, said = size_on_disk(path), (image["width"], image["height"])
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file, but {self.annotations} lists it") from error
        if found != said:
            raise UserError(
                f"{path}: is {found[0]} x {found[1]} pixels (upright, if EXIF turns it), but {self.annotations} says "
                f"{said[0]} x {said[1]}"
            )

    def read(self, row: int) -> tuple[Tensor, ObjectTargets]:
        """Image uint8 [3, H, W] and its usable objects."""
        image = self.images[row]
        pixels = read_pixels(below(self.location, image["file_name"]))
        height, width = pixels.shape[1:]
        objects = json.loads(self.objects[row])
        masks = np.zeros((len(objects) if self.with_masks else 0, height, width), np.uint8)
        for place, entry in enumerate(objects[: len(masks)]):
            masks[place] = rle.decode(encoded(entry["mask"], height, width))
        boxes = torch.tensor([entry["box"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([self.category_ids.index(entry["category"]) + 1 for entry in objects], dtype=torch.int64)
        return pixels, ObjectTargets(boxes, labels, torch.from_numpy(masks))

    def truth(self) -> dict[str, Any]:
        """The annotations that detections are scored against."""
        assert self.dataset is not None
        return self.dataset


class SceneObjects(Scenes):
    """Generated scenes with their boxes and masks; image and category ids count from 1."""

    @property
    def category_ids(self) -> list[int]:
        """Category by number of the class."""
        return [*range(1, len(self.classes) + 1)]

    def image_id(self, row: int) -> int:
        """Number of a scene, from 1 on."""
        return row + 1

    def read(self, row: int) -> tuple[Tensor, ObjectTargets]:
        """As :meth:`CocoImages.read`."""
        scene = self.scenes.scene(row)
        objects = ObjectTargets(
            torch.from_numpy(scene.boxes), torch.from_numpy(scene.classes) + 1, torch.from_numpy(scene.masks).byte()
        )
        return torch.from_numpy(scene.image).permute(2, 0, 1), objects

    def truth(self) -> dict[str, Any]:
        """All scenes as a COCO dataset."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        side = self.scenes.size
        for row in range(len(self)):
            scene = self.scenes.scene(row)
            images.append({"id": row + 1, "file_name": self.key(row), "width": side, "height": side})
            for box, label, mask in zip(scene.boxes.tolist(), scene.classes.tolist(), scene.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": row + 1,
                        "category_id": label + 1,
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": rle.encode(np.asfortranarray(mask.astype(np.uint8))),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in enumerate(self.classes, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}


def open_objects(config: FinetuneJobConfig, settings: DetectConfig, split: Split) -> CocoImages | SceneObjects | None:
    """A split for detection."""
    location = split_location(config, split)
    if location is None:
        return None
    if location == SAMPLES:
        return SceneObjects(config, split)
    images = absolute(location)
    if not is_web(images) and not is_folder(images):
        raise UserError(f"{images}: no such folder of images")
    given = settings.train_annotations if split == "train" else settings.val_annotations
    folder, name = os.path.split(images)
    annotations = absolute(given) if given else os.path.join(folder, "annotations", f"instances_{name}.json")
    if not exists(annotations):
        raise UserError(f"{annotations}: no such file; set detect.{split}_annotations to the COCO JSON of {images}")
    return CocoImages(images, annotations, masks=settings.masks, training=split == "train")
