"""Generated sample scenes with labels, boxes, masks and a label map, for machines without a dataset.

A scene has one dominant object, whose shape is the image's label, and smaller objects around it. Only shape depends on the
class; colour, brightness, texture, size and position do not.
"""

import hashlib
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import UserError
from pipeline.sources.base import IndexRow, finish_index, make_table
from pipeline.sources.locations import SAMPLES
from pipeline.sources.shapes import CLASSES, coverage

SEGMENTATION_CLASSES = ("background", *CLASSES)
"""Classes of `Scene.semantic`: 0 is the background, a class like any other; object class c is c + 1."""

_LUMA = np.array([0.299, 0.587, 0.114])

_MIN_VISIBLE = 1 / 400
"""Minimum visible share of the image; objects with less are left out of the scene."""


class Scene(NamedTuple):
    """One image with consistent annotations; the dominant object comes first.

    Attributes:
        image: uint8 [H, W, 3] RGB.
        label: class of the dominant object.
        boxes: float32 [n, 4], (left, top, right, bottom) in pixels, right and bottom exclusive, tight around the mask.
        classes: int64 [n].
        masks: bool [n, H, W] of the visible pixels; no two overlap.
        semantic: uint8 [H, W], see `SEGMENTATION_CLASSES`.
    """

    image: np.ndarray
    label: int
    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray
    semantic: np.ndarray


@dataclass(frozen=True)
class SceneSettings:
    """Number of scenes, their side in pixels, and their seed."""

    count: int = 800
    size: int = 96
    seed: int = 0


@dataclass(frozen=True)
class SampleScenes:
    """`count` scenes of `size` x `size` pixels; scene i is a function of (seed, split, i, size)."""

    random_access: ClassVar[bool] = True
    location: ClassVar[str] = SAMPLES
    classes: ClassVar[tuple[str, ...]] = CLASSES
    segmentation_classes: ClassVar[tuple[str, ...]] = SEGMENTATION_CLASSES

    split: str
    count: int
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        count, size = f"data.samples.{self.split}", "data.samples.size"
        for flag, value, least in ((count, self.count, 1), (size, self.size, 32), ("seed", self.seed, 0)):
            if value < least:
                raise UserError(f"{flag}={value}: must be at least {least} for sample scenes")

    @property
    def name(self) -> str:
        """All parameters of the scenes, such as `samples-train-n800-s96-seed0`."""
        return f"samples-{self.split}-n{self.count}-s{self.size}-seed{self.seed}"

    def versions(self) -> dict[str, int]:
        """None: every image is a file of its own."""
        return {}

    def only(self, files: Sequence[str]) -> "SampleScenes":
        """This source, which has no such files."""
        return self

    def index(self) -> pa.Table:
        """One row per scene; its number is `offset`, and labels cycle through the classes. Renders nothing: `size` is 0."""
        text = f"{self.seed} {self.split} {self.size}"
        version = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
        rows = (
            IndexRow(f"scene-{number:08d}", number % len(CLASSES), "", number, 0, version)
            for number in range(self.count)
        )
        return finish_index(make_table(rows), location=self.location, looked_for="data.samples")

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """Scenes as PNG, which decodes to exactly `scene(i).image`."""
        for number in rows["offset"].to_pylist():
            buffer = io.BytesIO()
            Image.fromarray(self.scene(number).image).save(buffer, "PNG", compress_level=1)
            yield buffer.getvalue()

    def scene(self, number: int) -> Scene:
        """Render one scene."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(zlib.crc32(self.split.encode()), number))
        random = np.random.default_rng(seed)
        label = number % len(CLASSES)
        labels, covers, masks = _visible(*_draw_objects(random, label, self.size))
        image = _surface(random, self.size)
        for cover in reversed(covers):
            image = _blend(random, image, cover)
        semantic = np.zeros((self.size, self.size), np.uint8)
        for kind, mask in zip(labels, masks, strict=True):
            semantic[mask] = kind + 1
        noise = random.standard_normal(image.shape, np.float32)
        pixels = np.clip(np.rint(image + random.uniform(2, 10) * noise), 0, 255).astype(np.uint8)
        boxes = np.array([Image.fromarray(mask).getbbox() for mask in masks], np.float32)
        return Scene(pixels, label, boxes, np.array(labels, np.int64), masks, semantic)


def _draw_objects(random: np.random.Generator, label: int, size: int) -> tuple[list[int], list[np.ndarray]]:
    """Classes and coverages from front to back: the dominant object, then one to three distractors."""
    extent = random.uniform(0.36, 0.48) * size
    centre = size / 2 + random.uniform(-0.08, 0.08, 2) * size
    labels, covers = [label], [_draw_object(random, label, centre, extent, size)]
    for _ in range(random.integers(1, 4)):
        kind = int(random.integers(len(CLASSES)))
        labels.append(kind)
        centre = random.uniform(0.05, 0.95, 2) * size
        covers.append(_draw_object(random, kind, centre, random.uniform(0.25, 0.45) * extent, size))
    return labels, covers


def _draw_object(random: np.random.Generator, label: int, centre: np.ndarray, extent: float, size: int) -> np.ndarray:
    turn = np.deg2rad(random.uniform(-15, 15))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    stretch = np.exp(random.uniform(-0.12, 0.12))
    return coverage(label, centre, extent, rotation @ np.diag([stretch, 1 / stretch]), size)


def _visible(labels: list[int], covers: list[np.ndarray]) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """The objects that are visible, and their visible masks: bool [n, H, W]."""
    taken = np.zeros(covers[0].shape, bool)
    seen = []
    for label, cover in zip(labels, covers, strict=True):
        mask = (cover >= 0.5) & ~taken
        if mask.mean() >= _MIN_VISIBLE:
            seen.append((label, cover, mask))
            taken |= mask
    labels, covers, masks = map(list, zip(*seen, strict=True))
    return labels, covers, np.stack(masks)


# Painting goes through sums, products and resizing alone: transcendental functions of arrays differ in the last bit between
# processors, and the pixels must not.
def _surface(random: np.random.Generator, size: int) -> np.ndarray:
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


def _blend(random: np.random.Generator, image: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Paint an object with the given coverage, brighter or darker than the pixels it hides: float32 like `image`."""
    paint = _surface(random, len(image))
    hidden = _mean_luma(image, cover)
    contrast = random.uniform(35, 90) * random.choice((-1, 1))
    if not 20 < hidden + contrast < 235:
        contrast = -contrast
    # Rounded, because the last bits of a sum depend on the processor.
    shift = round(hidden + contrast - _mean_luma(paint, cover))
    return image + cover[..., None] * (paint + np.float32(shift) - image)


def _mean_luma(image: np.ndarray, cover: np.ndarray) -> float:
    return float(np.tensordot(cover, image, 2) @ _LUMA / cover.sum())
