"""Images with label maps: `images/<split>` next to `annotations/<split>` or `masks/<split>`, as in ADE20K."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.downstream.base import Split
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.images import Scenes, check_rows, image_files, read_pixels, size_on_disk, split_location
from pipeline.downstream.segment.classes import MaskValues
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_label_map
from pipeline.sources.label_maps import masks_folder
from pipeline.sources.locations import SAMPLES, absolute
from pipeline.storage.files import is_folder, read_bytes
from pipeline.storage.remote import is_web


class MaskedImages:
    """Image files and their label maps.

    Args:
        images, masks: folders, by local path or URI; a mask has the image's relative path, ending in .png.
        values: what the values of the masks mean.
        training: whether there must be more than one class to learn.
    """

    block = 1

    def __init__(self, images: str | Path, masks: str | Path, values: MaskValues, *, training: bool = True) -> None:
        self.location, self.masks, self.values, self.training = str(images), str(masks), values, training
        self.classes = values.classes
        if not is_web(self.location) and not is_folder(self.location):
            raise UserError(f"{images}: no such folder of images")
        files, self.left_out = image_files(self.location)
        self.names = sorted(path.removeprefix(os.path.join(self.location, "")) for path in files)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        """Path below the folder of images."""
        return self.names[row]

    def mask_path(self, row: int) -> str:
        """File of a row's label map."""
        return os.path.splitext(os.path.join(self.masks, self.names[row]))[0] + ".png"

    def check(self) -> list[str]:
        """Every image must have a label map of its size, and all values must be known; notes on classes that do not occur."""
        first: dict[int, int] = {}
        for row, values in enumerate(check_rows(self._check_row, len(self))):
            for value in values:
                first.setdefault(value, row)
        if unknown := [value for value in first if value not in self.values.names and value not in self.values.ignored]:
            self.values.refuse_unknown(unknown[0], self.mask_path(first[unknown[0]]), first)
        return [*self.left_out, *self.values.check(first, self.masks, self.training)]

    def _check_row(self, row: int) -> list[int]:
        """The values of a label map, which must have the size of its image."""
        path = os.path.join(self.location, self.names[row])
        size, mask = size_on_disk(path), self._mask(row)
        if mask.shape != size[::-1]:
            raise UserError(
                f"{self.mask_path(row)}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {path} is "
                f"{size[0]} x {size[1]} (upright, if EXIF turns it)"
            )
        values: list[int] = np.unique(mask).tolist()
        return values

    def _mask(self, row: int) -> np.ndarray:
        path = self.mask_path(row)
        try:
            return decode_label_map(read_bytes(path))
        except FileNotFoundError as error:
            image = f"the image {self.names[row]} in {self.location}"
            raise UserError(f"{path}: there is no such label map for {image}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3, H, W] and labels uint8 [H, W], `IGNORE` for unlabelled pixels."""
        image, mask = read_pixels(os.path.join(self.location, self.names[row])), self._mask(row)
        if mask.shape != image.shape[1:]:
            raise UserError(f"{self.mask_path(row)}: its size is not that of its image")
        try:
            return image, torch.from_numpy(self.values.labels(mask))
        except ValueError as error:
            raise UserError(f"{self.mask_path(row)}: {error}") from error


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
    images = absolute(location)
    folder = absolute(masks) if masks else masks_folder(images)
    if folder is None:
        raise UserError(
            f"{images}: no annotations or masks folder next to `images` in its path; set segment.{split}_masks to the folder"
        )
    values = MaskValues.of(absolute(settings.classes), zero_ignored=settings.reduce_zero_label, ignore=settings.ignore)
    return MaskedImages(images, folder, values, training=split == "train")
