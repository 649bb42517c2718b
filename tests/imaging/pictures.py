"""Small synthetic pictures."""

import io

import numpy as np
from PIL import Image


def photo(side: int = 64) -> Image.Image:
    ramp = np.linspace(0, 255, side)
    pixels = np.stack(
        [ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None], 0 * ramp[None] + 90 + 0 * ramp[:, None]], -1
    )
    return Image.fromarray(pixels.astype(np.uint8))


def planes(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
