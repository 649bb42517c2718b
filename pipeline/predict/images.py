"""Images as users have them: files, folders, arrays, and lists of these."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipeline.downstream.images import image_files
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image, to_rgb
from pipeline.runtime.prefetch import map_ahead

log = logging.getLogger(__name__)

Images = str | Path | np.ndarray | Image.Image | Sequence[Any]
"""An image file, a folder of them, an RGB array uint8 [H, W, 3], a PIL image, or a list of these."""

One = Path | np.ndarray | Image.Image


def list_images(images: Images) -> list[One]:
    """Every image once: the sorted image files below a folder except hidden ones; lists in their order.

    Raises:
        UserError: for a path that does not exist, a folder without images, or an empty list.
    """
    if isinstance(images, str | Path):
        found, notes = find_images([Path(images)])
        for note in notes:
            log.warning("left out: %s", note)
        return [*found]
    if isinstance(images, np.ndarray | Image.Image):
        return [images]
    listed = [image for item in images for image in list_images(item)]
    if not listed:
        raise UserError("there are no images: the list is empty")
    return listed


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The image files that paths name or hold, folder after folder, and notes on other files in the folders."""
    found: list[Path] = []
    notes: list[str] = []
    for path in paths:
        if path.is_dir():
            files, left_out = image_files(str(path))
            found += sorted(map(Path, files))
            notes += [f"{path}: {note}" for note in left_out]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found, notes


def decoded(images: Sequence[One], ahead: int, unreadable: dict[Path, str] | None = None) -> Iterator[Image.Image]:
    """Upright RGB pixels of each image, decoded in threads ahead of use.

    Args:
        unreadable: collects the reason by file for skipped images; None: the first unreadable one raises.

    Raises:
        UserError: naming an image that cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        for image, result in zip(images, map_ahead(pool, _attempt, images, ahead), strict=True):
            if isinstance(result, Image.Image):
                yield result
            elif isinstance(image, Path) and unreadable is not None:
                unreadable[image] = str(result)
            else:
                raise result


def _attempt(image: One) -> Image.Image | UserError:
    try:
        return opened(image)
    except UserError as error:
        return error


def opened(image: One) -> Image.Image:
    """Upright RGB pixels; UserError naming an image that cannot be read, or the fault of an array."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an array must be RGB uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image)
    try:
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image))
        return decode_image(image.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{image}: {error}") from error
