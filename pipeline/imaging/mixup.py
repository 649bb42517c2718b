"""Mixup (Zhang et al. 2018) of a view with one of another image: drawn once, for teacher and student alike.

Shares are uniform, as in Beyer et al. (2022, "Knowledge distillation: a good teacher is patient and consistent"), in steps of
1/256, so that the blend of 8-bit levels is exact.
"""

import hashlib
from typing import NamedTuple

import numpy as np

LEVELS = 256
"""Steps of a share."""


class Mix(NamedTuple):
    """A view is `share` of its own image, and the rest is the view of the same number of the partner.

    `partner` is the partner's number among the images that it is drawn from.
    """

    partner: int
    share: float


def draw_mixes(probability: float, seed: int, image: str, place: int, images: int, views: int) -> list[Mix | None]:
    """What each of the views of an image, number `place` of `images`, is mixed with; a function of the arguments.

    The first view never is: kNN takes it for an image of its class.
    """
    digest = hashlib.blake2b(f"{seed} {image} mixup".encode(), digest_size=8).digest()
    uniform = np.random.default_rng(int.from_bytes(digest, "little")).random((views, 3)).tolist()
    return [
        Mix((place + 1 + int(which * (images - 1))) % images, round(share * LEVELS) / LEVELS)
        if number and images > 1 and mixed < probability
        else None
        for number, (mixed, which, share) in enumerate(uniform)
    ]


def blend(pixels: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """`share` of the first plus the rest of the second, [3, H, W] uint8 each -> the same, rounded half up."""
    level = round(share * LEVELS)
    sums = pixels.astype(np.uint16) * np.uint16(level) + other.astype(np.uint16) * np.uint16(LEVELS - level)
    return ((sums + np.uint16(LEVELS // 2)) >> np.uint16(8)).astype(np.uint8)
