"""Encoded images for the source tests."""

import io

import numpy as np
from PIL import Image


def encode(seed: int, kind: str = "JPEG", side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()
