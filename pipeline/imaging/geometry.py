"""View geometry shared by teachers and student: a view is cut from the original pixels and resized once."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline.imaging.photometric import Photometric, PhotometricPolicy


@dataclass(frozen=True)
class View:
    """One view of an image; ValueError if its box is empty or leaves the image.

    Attributes:
        box: (left, top, right, bottom) as fractions of the upright image, in [0, 1].
        flip: whether left and right are mirrored after the cut.
        photometric: changes of its resized pixels; None: none.
    """

    box: tuple[float, float, float, float]
    flip: bool = False
    photometric: Photometric | None = None

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"view box {self.box} is not left < right, top < bottom within [0, 1]")


FULL = View((0.0, 0.0, 1.0, 1.0))

_ATTEMPTS = 10
"""Crops to try, as in torchvision's RandomResizedCrop, until one fits into the image; then the whole image is used."""


@dataclass(frozen=True)
class ViewPolicy:
    """The views of each image that are cached.

    Attributes:
        crops: random resized crops per image; 0: the whole image as its only view, and the other fields are ignored.
        min_area: minimum share of the image's area.
        max_ratio: maximum aspect ratio of a crop, in either direction.
        flip: probability that a crop is mirrored.
        seed: determines the crops of an image together with its sample id.
        photometric: how the pixels of a crop are changed; None: not at all. Boxes do not depend on it.
        mixup: probability that a crop is mixed with one of another image (`draw_mixes`); None: 0.
    """

    crops: int = 0
    min_area: float = 0.35
    max_ratio: float = 4 / 3
    flip: float = 0.5
    seed: int = 0
    photometric: PhotometricPolicy | None = None
    mixup: float | None = None

    @property
    def rows_per_image(self) -> int:
        """Number of views per image."""
        return self.crops or 1

    @property
    def id(self) -> str:
        """``full``, or ``crops<n>-`` and a short hash of all fields that are set."""
        if not self.crops:
            return "full"
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return f"crops{self.crops}-{hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]}"

    def views(self, sample_id: str, width: int, height: int) -> list[View]:
        """The views of an upright image of this size in pixels; all values are exact in float32."""
        if not self.crops:
            return [FULL]
        digest = hashlib.blake2b(f"{self.seed} {sample_id}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        views = [self._crop(rng, width, height) for _ in range(self.crops)]
        if self.photometric is None:
            return views
        changes = self.photometric.draw(self.seed, sample_id, self.crops)
        return [replace(view, photometric=values) for view, values in zip(views, changes, strict=True)]

    def _crop(self, rng: np.random.Generator, width: int, height: int) -> View:
        for _ in range(_ATTEMPTS):
            area = rng.uniform(self.min_area, 1)
            ratio = math.exp(rng.uniform(-math.log(self.max_ratio), math.log(self.max_ratio)))
            wide, high = math.sqrt(area * ratio * height / width), math.sqrt(area / ratio * width / height)
            left, top = rng.uniform(0, 1), rng.uniform(0, 1)
            if wide <= 1 and high <= 1:
                left, top = left * (1 - wide), top * (1 - high)
                edges = np.array([left, top, min(left + wide, 1), min(top + high, 1)], np.float32).tolist()
                return View((edges[0], edges[1], edges[2], edges[3]), bool(rng.random() < self.flip))
        return View(FULL.box, bool(rng.random() < self.flip))


WHOLE = ViewPolicy()
"""One view per image: `FULL`."""
