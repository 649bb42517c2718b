"""Images as users have them: files, folders, arrays, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.prefetch import map_ahead
from pipeline.sources.base import IMAGE_EXTENSIONS
from pipeline.views import decode_image

Images = str | Path | np.ndarray | Image.Image | Sequence[Any]
"""An image file, a folder of them, an RGB array uint8 [H, W, 3], a PIL image, or a list of these."""

One = Path | np.ndarray | Image.Image

THREADS = 4
"""Images that are decoded at once."""


def list_images(images: Images) -> list[One]:
    """Every image once: folders as the sorted image files below them, lists in their order.

    Raises:
        UserError: for a path that is not there, a folder without images, or an empty list.
    """
    if isinstance(images, str | Path):
        return [*find_images([Path(images)])]
    if isinstance(images, np.ndarray | Image.Image):
        return [images]
    found = [image for item in images for image in list_images(item)]
    if not found:
        raise UserError("there are no images: the list is empty")
    return found


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files that paths name or hold, folder after folder.

    Raises:
        UserError: for a path that is not there, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            images = [file for file in below if file.suffix.lower() in IMAGE_EXTENSIONS]
            if not images:
                raise UserError(f"{path}: no images found; looked for {', '.join(IMAGE_EXTENSIONS)}")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def decoded(images: Sequence[One], ahead: int) -> Iterator[Image.Image]:
    """Upright RGB pixels of each image, decoded in threads ahead of use.

    Raises:
        UserError: naming an image that cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        yield from map_ahead(pool, opened, images, ahead)


def opened(image: One) -> Image.Image:
    """Upright RGB pixels.

    Raises:
        UserError: naming an image that cannot be read, or what is wrong with an array.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an array must be RGB uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image)
    try:
        return decode_image(image.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{image}: {error}") from error
