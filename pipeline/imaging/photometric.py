"""Photometric changes of views that teacher and student both see: values that are drawn once, and their one application.

Colour is one affine map of RGB, without rounding between brightness, contrast, saturation and hue; blur follows. Coefficients
are multiples of 2^-12, so that sums of their products with 8-bit levels are exact in float32: pixels do not depend on threads,
instruction sets or the order of additions.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = (0.1 / 224, 2.0 / 224)
"""Range of the blur's standard deviation as a share of the view's sides: 0.1 to 2 pixels of 224, as in DINO (Caron et al.)."""
UNIT = 2.0**-12
"""Unit of all coefficients."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the luma of ITU-R BT.601."""
_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Photometric(NamedTuple):
    """The photometric values of a view, exact in float32.

    Attributes:
        brightness, contrast, saturation: factors; saturation 0 gives grey.
        hue: rotation of the chroma (I and Q of YIQ), as a share of the circle.
        blur: standard deviation of a Gaussian, as a share of the width along rows and of the height along columns; 0: none.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    blur: float


UNCHANGED = Photometric(1.0, 1.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class PhotometricPolicy:
    """How photometric values are drawn: probabilities `jitter`, `grey` and `blur`, and the largest changes of a jitter.

    Brightness, contrast and saturation are factors in [max(0, 1 - change), 1 + change], and the hue turns by at most `hue` of the
    circle either way.
    """

    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.0
    blur: float = 0.0

    def __bool__(self) -> bool:
        """Whether any view is changed."""
        return bool(self.jitter or self.grey or self.blur)

    def draw(self, seed: int, image: str, count: int) -> list[Photometric]:
        """The values of the `count` views of an image, a function of the arguments; of a stream apart from that of the boxes."""
        digest = hashlib.blake2b(f"{seed} {image} photometric".encode(), digest_size=8).digest()
        uniform = np.random.default_rng(int.from_bytes(digest, "little")).random((count, 8))
        return [self._values(row) for row in uniform.tolist()]

    def _values(self, uniform: list[float]) -> Photometric:
        jittered, greyed, blurred, *free = uniform
        values = UNCHANGED
        if jittered < self.jitter:
            changes = zip((self.brightness, self.contrast, self.saturation), free, strict=False)
            brightness, contrast, saturation = (
                max(0.0, 1 - change) * (1 - at) + (1 + change) * at for change, at in changes
            )
            values = Photometric(brightness, contrast, saturation, self.hue * (2 * free[3] - 1), 0.0)
        if greyed < self.grey:
            values = values._replace(saturation=0.0, hue=0.0)
        if blurred < self.blur:
            values = values._replace(blur=BLUR[0] + (BLUR[1] - BLUR[0]) * free[4])
        return Photometric(*map(float, np.array(values, np.float32)))


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
