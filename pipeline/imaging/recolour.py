"""The photometric changes of a view, applied to its pixels for teachers and student alike.

Colour is one affine map of RGB, without rounding between brightness, contrast, saturation and hue; blur follows. Coefficients
are multiples of 2^-12, so that sums of their products with 8-bit levels are exact in float32: pixels do not depend on threads,
instruction sets or the order of additions.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.imaging.photometric import UNCHANGED, Photometric

UNIT = 2.0**-12
"""Unit of all coefficients."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the luma of ITU-R BT.601."""
_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def change_pixels(pixels: np.ndarray, values: Photometric | None) -> np.ndarray:
    """[3, H, W] uint8 RGB of a whole view, after its resizing -> the same with these changes; `pixels` itself without any."""
    if values is None or values == UNCHANGED:
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).float()
    if values[:4] != UNCHANGED[:4]:
        planes = _recolour(planes, *_colour_map(values, pixels))
    if values.blur:
        height, width = planes.shape[1:]
        planes = _smooth(_smooth(planes, values.blur * width, -1), values.blur * height, -2)
    changed: np.ndarray = planes.to(torch.uint8).numpy()
    return changed


def _colour_map(values: Photometric, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix [3, 3] and offset in levels that give the changed RGB.

    Contrast is relative to the mean luma, as in torchvision. Saturation and hue leave grey as it is, so they do not move it.
    """
    turn = 2 * math.pi * values.hue
    rotation = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    saturation = values.saturation * np.eye(3) + (1 - values.saturation) * LUMA
    matrix = values.brightness * values.contrast * (np.linalg.inv(_YIQ) @ rotation @ _YIQ @ saturation)
    mean = pixels.reshape(3, -1).sum(axis=1, dtype=np.int64) @ LUMA / pixels[0].size
    return _rounded(matrix), float(_rounded((1 - values.contrast) * values.brightness * mean))


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.round(values / UNIT) * UNIT


def _recolour(planes: Tensor, matrix: np.ndarray, offset: float) -> Tensor:
    """Whole levels [3, H, W] float32 of the affine map."""
    changed = torch.empty_like(planes)
    for plane, (first, *others) in zip(changed, matrix.tolist(), strict=True):
        torch.mul(planes[0], first, out=plane)
        for source, factor in zip(planes[1:], others, strict=True):
            plane.add_(source, alpha=factor)
    return changed.add_(offset).round_().clamp_(0, 255)


def _smooth(planes: Tensor, sigma: float, dim: int) -> Tensor:
    """Whole levels [3, H, W] float32, blurred along `dim` (-1 or -2) with a deviation of `sigma` pixels, up to two deviations.

    Slices are added because a convolution of such shape takes two to ten times as long on a CPU.
    """
    reach, length = math.ceil(2 * sigma), planes.shape[dim]
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = _rounded(weights / weights.sum())
    weights[reach] += 1 - weights.sum()
    padded = F.pad(planes, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
    blurred = padded.narrow(dim, 0, length) * float(weights[0])
    for offset, weight in enumerate(weights[1:].tolist(), 1):
        blurred.add_(padded.narrow(dim, offset, length), alpha=weight)
    return blurred.round_()
