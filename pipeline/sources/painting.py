"""Random surfaces for sample scenes: colour, shading and texture that are independent of an object's class.

Arrays go through sums, products and resizing alone. Transcendental functions differ in the last bit between processors, and
the pixels must not.
"""

import math

import numpy as np
from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114])


def surface(random: np.random.Generator, size: int) -> np.ndarray:
    """A colour with linear shading, cloudy texture and a grating: float32 [size, size, 3], roughly in 0..255."""
    colour = random.uniform(70, 185) + random.uniform(-50, 50, 3)
    tint = random.uniform(0.6, 1.0, 3)
    steps = np.linspace(-1, 1, size, dtype=np.float32)
    pattern = random.uniform(0, 35) * _ramp(random, steps)
    pattern += random.uniform(0, 12) * _grating(random, steps)
    pattern += random.uniform(4, 18) * _clouds(random, size)
    return pattern[..., None] * tint.astype(np.float32) + colour.astype(np.float32)


def _ramp(random: np.random.Generator, steps: np.ndarray) -> np.ndarray:
    turn = random.uniform(0, 2 * math.pi)
    return math.cos(turn) * steps[None, :] + math.sin(turn) * steps[:, None]


def _grating(random: np.random.Generator, steps: np.ndarray) -> np.ndarray:
    """A triangle wave of one to six periods in a random direction, in [-1, 1]."""
    position = random.uniform(1, 6) * _ramp(random, steps) + random.uniform(0, 2)
    return 2 * np.abs(position % 2 - 1) - 1


def _clouds(random: np.random.Generator, size: int) -> np.ndarray:
    cells = int(random.integers(4, 17))
    coarse = random.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def blend(random: np.random.Generator, image: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Paint an object with the given coverage, brighter or darker than the pixels it hides: float32 like `image`."""
    paint = surface(random, len(image))
    hidden = _mean_luma(image, cover)
    contrast = random.uniform(35, 90) * random.choice((-1, 1))
    if not 20 < hidden + contrast < 235:
        contrast = -contrast
    # Rounded, because the last bits of a sum depend on the processor.
    shift = round(hidden + contrast - _mean_luma(paint, cover))
    return image + cover[..., None] * (paint + np.float32(shift) - image)


def _mean_luma(image: np.ndarray, cover: np.ndarray) -> float:
    return float(np.tensordot(cover, image, 2) @ _LUMA / cover.sum())
