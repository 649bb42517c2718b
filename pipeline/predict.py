"""A trained backbone on images of one's own, in a few lines.

    from pipeline.predict import load_predictor

    predictor = load_predictor("work/runs/<run>/student")
    features = predictor.features("photos")  # [N, C]: a file, a folder, an array, or a list of these

Imports neither Ray nor, but for models in MLflow, MLflow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.prefetch import map_ahead
from pipeline.sources.base import IMAGE_EXTENSIONS
from pipeline.student.loading import load_any
from pipeline.views import FULL, decode_image, render

Images = str | Path | np.ndarray | Image.Image | Sequence[Any]
"""An image file, a folder of them, an RGB array uint8 [H, W, 3], a PIL image, or a list of these."""

THREADS = 4
"""Images that are decoded at once."""


class Predictor:
    """An encoder ready for images of any size.

    Args:
        encoder: [B, 3, H, W] float32 RGB in [0, 1] -> [B, C]; moved to the device, in evaluation mode.
        input_size: side in pixels that images are resized to, once, bicubic.
        device: of torch; None: a GPU where there is one.
        batch_size: images per forward.

    Raises:
        UserError: for a device that is not there.
    """

    def __init__(self, encoder: nn.Module, input_size: int, device: str | None = None, batch_size: int = 32) -> None:
        self.input_size, self.batch_size = input_size, batch_size
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.encoder = encoder.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """Vectors [N, C] float32 on the CPU, in the order of :func:`list_images`.

        Raises:
            UserError: naming an image that cannot be read.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = map_ahead(pool, self._pixels, list_images(images), ahead=2 * self.batch_size)
            parts = [
                self.encoder(torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2) / 255).float().cpu()
                for batch in _batched(pixels, self.batch_size)
            ]
        return torch.cat(parts)

    def _pixels(self, image: Path | np.ndarray | Image.Image) -> np.ndarray:
        return render(_opened(image), FULL, (self.input_size, self.input_size), "bicubic")


def load_predictor(
    student: str,
    *,
    weights: str = "pretrained",
    input_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
    tracking_uri: str = "",
) -> Predictor:
    """A predictor of an exported folder, an MLflow model URI or a timm name.

    Args:
        student, weights, tracking_uri: as in :func:`~pipeline.student.loading.load_any`.
        input_size: in pixels; None: as an exported student was trained, else 224.
        device, batch_size: as in :class:`Predictor`.

    Raises:
        UserError: where there is no such backbone or device.
    """
    loaded = load_any(student, weights=weights, tracking_uri=tracking_uri)
    return Predictor(loaded.encoder, input_size or loaded.input_size or 224, device, batch_size)


def list_images(images: Images) -> list[Path | np.ndarray | Image.Image]:
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


def writer_of(file: Path) -> Callable[[Sequence[Path], Tensor], None]:
    """What writes one row an image to a file: ``path``, and ``features`` as float32.

    Args:
        file: ends in ``.parquet``, or in ``.json`` for a list of objects.

    Raises:
        UserError: for another ending, or where its folder cannot be made.
    """
    if file.suffix not in _WRITERS:
        raise UserError(f"{file}: the name must end in {' or '.join(_WRITERS)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    return partial(_WRITERS[file.suffix], file)


def _write_parquet(file: Path, paths: Sequence[Path], features: Tensor) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().ravel()), features.shape[1])
    pq.write_table(pa.table({"path": [str(path) for path in paths], "features": vectors}), file)


def _write_json(file: Path, paths: Sequence[Path], features: Tensor) -> None:
    rows = [{"path": str(path), "features": row} for path, row in zip(paths, features.tolist(), strict=True)]
    file.write_text(json.dumps(rows), encoding="utf-8")


_WRITERS = {".parquet": _write_parquet, ".json": _write_json}


def _opened(image: Path | np.ndarray | Image.Image) -> Image.Image:
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


def _batched(pixels: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(pixels, size)):
        yield batch
