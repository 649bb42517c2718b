"""Label maps for semantic segmentation: mask files in ADE20K's layout, or those of the generated scenes."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.errors import UserError
from pipeline.imaging.decode import decode_label_map, image_size
from pipeline.sources.base import Source
from pipeline.sources.hold_out import HoldOut
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.sample_scenes import SEGMENTATION_CLASSES, SampleScenes
from pipeline.storage.files import HEADER, THREADS, is_folder, open_binary, read_bytes

IGNORE = -1
"""Label of a pixel without a class."""

UNLABELLED = 255
"""Value of a pixel without a class in a mask file; 0 means the same."""


class LabelMaps(Protocol):
    """The label maps of a source, by sample id. Picklable."""

    def read(self, sample_id: str) -> np.ndarray:
        """Class of every pixel: int64 [H, W], `IGNORE` for none."""

    def check(self) -> int:
        """The number of classes: the largest class in any label map, plus one.

        Raises:
            UserError: naming the first image without a matching label map.
        """


@dataclass(frozen=True)
class MaskFolder:
    """`<masks>/<path of the image>.png`: 0 and 255 are ignored, any other value v is class v - 1, as in ADE20K's SceneParse150.

    Attributes:
        images, masks: folders, by local path or URI.
        sample_ids: paths of the images below `images`.
    """

    images: str
    masks: str
    sample_ids: tuple[str, ...]

    def path(self, sample_id: str) -> str:
        """File of an image's mask."""
        return os.path.splitext(os.path.join(self.masks, sample_id))[0] + ".png"

    def read(self, sample_id: str) -> np.ndarray:
        """See :class:`LabelMaps`."""
        path = self.path(sample_id)
        try:
            values = decode_label_map(read_bytes(path)).astype(np.int64)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no readable mask of {self.images}/{sample_id}: {error}") from error
        return np.where(values == UNLABELLED, IGNORE, values - 1)

    def check(self) -> int:
        """See :class:`LabelMaps`; a mask must be as large as its image when upright."""
        with ThreadPoolExecutor(THREADS) as pool:
            largest = max(pool.map(self._largest, self.sample_ids))
        if largest == IGNORE:
            raise UserError(f"{self.masks}: every pixel is 0 or 255 (ignored); classes count from 1")
        return largest + 1

    def _largest(self, sample_id: str) -> int:
        labels, image = self.read(sample_id), os.path.join(self.images, sample_id)
        try:
            with open_binary(image, HEADER) as file:
                width, height = image_size(file)
        except (OSError, SyntaxError):
            return IGNORE  # the cache quarantines it
        if labels.shape != (height, width):
            raise UserError(
                f"{self.path(sample_id)}: the mask is {labels.shape[1]}x{labels.shape[0]} pixels, its image {width}x{height} "
                "(upright by its EXIF orientation); resize the mask by nearest neighbour"
            )
        return int(labels.max())


@dataclass(frozen=True)
class SceneLabels:
    """Label maps of generated scenes: the background is class 0, and no pixel is ignored."""

    source: SampleScenes

    def read(self, sample_id: str) -> np.ndarray:
        """See :class:`LabelMaps`."""
        return self.source.scene(int(sample_id.rpartition("-")[2])).semantic.astype(np.int64)

    def check(self) -> int:
        """See :class:`LabelMaps`; counts all classes, whether or not they occur."""
        return len(SEGMENTATION_CLASSES)


def open_label_maps(source: Source, sample_ids: Sequence[str]) -> LabelMaps:
    """The label maps of a source.

    For an image folder, `images` in its path is replaced by `annotations` or `masks`: the label maps of
    `ade20k/images/training` are in `ade20k/annotations/training`.

    Raises:
        UserError: if the source cannot have label maps, or they do not exist.
    """
    if isinstance(source, HoldOut):
        source = source.whole
    if isinstance(source, SampleScenes):
        return SceneLabels(source)
    if not isinstance(source, ImageFolder):
        raise UserError(f"{source.location}: label maps need a folder of images, or `samples`")
    masks = masks_folder(source.root)
    if masks is None:
        raise UserError(
            f"{source.location}: found no label maps; put them into the folder of the same path with `images` replaced by "
            "`annotations` or `masks`, as in ade20k/images/training and ade20k/annotations/training"
        )
    return MaskFolder(source.root, masks, tuple(sample_ids))


def masks_folder(images: str) -> str | None:
    """The existing folder of label maps that belongs to a folder of images by its path, or None."""
    parts = images.rstrip(os.sep).split(os.sep)
    if "images" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("images")
    candidates = [os.sep.join([*parts[:last], name, *parts[last + 1 :]]) for name in ("annotations", "masks")]
    return next((folder for folder in candidates if is_folder(folder)), None)
