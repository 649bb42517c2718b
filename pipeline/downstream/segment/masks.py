"""Images with label maps: `images/<split>` next to `annotations/<split>` or `masks/<split>`, as in ADE20K."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.downstream.base import Split
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.images import Scenes, check_rows, image_files, read_pixels, size_on_disk, split_location
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.errors import UserError
from pipeline.imaging.decode import read_label_map
from pipeline.sources.label_maps import UNLABELLED, masks_folder
from pipeline.sources.locations import SAMPLES, absolute

IGNORE = UNLABELLED
"""Label of pixels that neither the loss nor the metrics count."""


class MaskedImages:
    """Image files and their label maps.

    Args:
        images, masks: folders; a mask has the image's relative path, ending in .png.
        classes: names by label.
        reduce_zero_label: whether mask value v is label v - 1, and 0 is ignored.
    """

    block = 1

    def __init__(self, images: Path, masks: Path, classes: tuple[str, ...], reduce_zero_label: bool) -> None:
        self.location, self.masks, self.classes, self.first = str(images), masks, classes, int(reduce_zero_label)
        if not images.is_dir():
            raise UserError(f"{images}: no such folder of images")
        files, self.left_out = image_files(images)
        self.names = sorted(str(path.relative_to(images)) for path in files)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        """Path below the folder of images."""
        return self.names[row]

    def mask_path(self, row: int) -> Path:
        """File of a row's label map."""
        return (self.masks / self.names[row]).with_suffix(".png")

    def check(self) -> list[str]:
        """Every image must have a label map of its size that holds only known classes."""
        check_rows(self._check_row, len(self))
        return self.left_out

    def _check_row(self, row: int) -> None:
        path = os.path.join(self.location, self.names[row])
        size, mask = size_on_disk(path), self._mask(row)
        if mask.shape != size[::-1]:
            raise UserError(
                f"{self.mask_path(row)}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {path} is "
                f"{size[0]} x {size[1]} (upright, if EXIF turns it)"
            )
        labels = np.unique(mask)
        beyond = labels[(labels != IGNORE) & (labels >= len(self.classes) + self.first)]
        if len(beyond):
            raise UserError(
                f"{self.mask_path(row)}: holds value {beyond[0]}, but segment.classes has {len(self.classes)} classes"
                + (" from 1 on" if self.first else " from 0 on; did you mean segment.reduce_zero_label=true?")
            )

    def _mask(self, row: int) -> np.ndarray:
        path = self.mask_path(row)
        if not path.is_file():
            raise UserError(f"{path}: there is no such label map for the image {self.names[row]} in {self.location}")
        try:
            return read_label_map(path)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3, H, W] and labels uint8 [H, W], `IGNORE` for unlabelled pixels."""
        image, mask = read_pixels(Path(self.location, self.names[row])), self._mask(row)
        if mask.shape != image.shape[1:]:
            raise UserError(f"{self.mask_path(row)}: its size is not that of its image")
        if self.first:
            mask = np.where((mask == 0) | (mask == IGNORE), IGNORE, mask.astype(np.int64) - 1)
        return image, torch.from_numpy(mask.astype(np.uint8))


class SceneMasks(Scenes):
    """Generated scenes with their label maps; nothing is ignored."""

    def __init__(self, config: FinetuneJobConfig, split: Split) -> None:
        super().__init__(config, split)
        self.classes = self.scenes.segmentation_classes

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """As :meth:`MaskedImages.read`."""
        scene = self.scenes.scene(row)
        return torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.semantic)


def open_masked(config: FinetuneJobConfig, settings: SegmentConfig, split: Split) -> MaskedImages | SceneMasks | None:
    """A split for segmentation."""
    location = split_location(config, split)
    if location is None:
        return None
    if location == SAMPLES:
        return SceneMasks(config, split)
    if settings.classes is None:
        raise UserError("segment.classes must be given: a file with the names of the classes, one a line or in a table")
    masks = settings.train_masks if split == "train" else settings.val_masks
    images = Path(absolute(location))
    folder = absolute(masks) if masks else masks_folder(str(images))
    if folder is None:
        raise UserError(
            f"{images}: no annotations or masks folder next to `images` in its path; set segment.{split}_masks to the folder"
        )
    classes = read_classes(Path(absolute(settings.classes)), int(settings.reduce_zero_label))
    return MaskedImages(images, Path(folder), classes, settings.reduce_zero_label)


def read_classes(path: Path, first: int) -> tuple[str, ...]:
    """Names of the classes from label `first` on.

    A table (.csv, .tsv, or text with tabs, such as ADE20K's objectInfo150.txt) has a column `name` and optionally a column
    `idx` or `index` with the mask value. Any other file has one name per line, in order.

    Raises:
        UserError: if the file is missing, has no such column, or leaves a gap.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"segment.classes: {path} cannot be read ({error})") from error
    delimiter = "\t" if any("\t" in line for line in lines[:1]) else ","
    if not lines or (delimiter not in lines[0] and path.suffix != ".csv"):
        return _checked(path, [line.strip() for line in lines])
    rows = [{str(k).strip().lower(): v for k, v in row.items()} for row in csv.DictReader(lines, delimiter=delimiter)]
    if not rows or "name" not in rows[0]:
        raise UserError(f"segment.classes: {path} has no column `name`")
    column = next((name for name in ("idx", "index") if name in rows[0]), None)
    if column is None:
        return _checked(path, [row["name"].strip() for row in rows])
    try:
        names = {int(row[column]): row["name"].strip() for row in rows}
    except (TypeError, ValueError) as error:
        raise UserError(f"segment.classes: {path} has a value in `{column}` that is no number ({error})") from error
    names = {value: name for value, name in names.items() if value >= first}
    if sorted(names) != list(range(first, first + len(names))):
        raise UserError(f"segment.classes: {path} leaves gaps between {first} and {max(names, default=first)}")
    return _checked(path, [names[value] for value in sorted(names)])


def _checked(path: Path, names: list[str]) -> tuple[str, ...]:
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"segment.classes: {path} has {len(names)} classes; there can be 1 to {IGNORE}")
    return tuple(names)
