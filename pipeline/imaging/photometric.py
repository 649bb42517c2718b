"""Photometric changes of views that teacher and student both see: values that are drawn once.

Their one application is in `recolour.py`, so that what draws and stores them need not import torch.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLUR = (0.1 / 224, 2.0 / 224)
"""Range of the blur's standard deviation as a share of the view's sides: 0.1 to 2 pixels of 224, as in DINO (Caron et al.)."""


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
