"""Pairs of images with the same key points: SPair-71k's layout (Min et al. 2019), and generated scenes that are moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.cache.layout.keys import digest
from pipeline.errors import UserError, one_line
from pipeline.predict.images import opened
from pipeline.sources.locations import SAMPLES
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.storage.names import folder_name

POINTS = 8
"""Key points of a generated pair at most."""
TURN, ZOOM, SHIFT = 20.0, (0.8, 1.25), 0.08
"""Largest turn in degrees, smallest and largest zoom, and largest shift in shares of the side, of a generated pair."""


@dataclass(frozen=True)
class Pair:
    """Two images and their key points.

    Attributes:
        points: [P, 2, 2] float32, (x, y) in pixels, of the first image and of the second.
        extent: the larger side of the object in the second image, in pixels; distances are shares of it.
    """

    first: Image.Image
    second: Image.Image
    points: np.ndarray
    extent: float


@dataclass(frozen=True)
class PairSet:
    """Pairs, read one after the other.

    Attributes:
        name: readable, with the first eight characters of the fingerprint at its end.
        fingerprint: digest of the settings of generated pairs, or of the annotations.
    """

    name: str
    location: str
    fingerprint: str
    count: int
    pairs: Iterator[Pair]


def open_pairs(location: str, split: str, count: int, size: int, seed: int) -> PairSet:
    """Find the pairs of a location.

    Args:
        location: `samples`, or a folder with `PairAnnotation/<split>/*.json` and `JPEGImages/<category>/`.
        count, size: of generated pairs, and side of their images in pixels.

    Raises:
        UserError: if there are no such files, or one is not an annotation.
    """
    if location == SAMPLES:
        scenes = SampleScenes("val", count, size, seed)
        generated = (_moved(scenes, number) for number in range(count))
        return _set(SAMPLES, location, digest([count, size, seed]), count, generated)
    folder = Path(location).expanduser() / "PairAnnotation" / split
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"correspondence.pairs: there are no annotations {folder}/*.json (SPair-71k's layout)")
    _annotated(files[0])
    fingerprint = digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
    return _set(
        f"{Path(location).name}-{split}", str(Path(location).resolve()), fingerprint, len(files), map(_annotated, files)
    )


def _set(name: str, location: str, fingerprint: str, count: int, pairs: Iterator[Pair]) -> PairSet:
    return PairSet(f"pairs-{folder_name(name)}-{fingerprint[:8]}", location, fingerprint, count, pairs)


def _annotated(file: Path) -> Pair:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        points = np.array([read["src_kps"], read["trg_kps"]], np.float32).transpose(1, 0, 2)
        left, top, right, bottom = read["trg_bndbox"]
        folder = file.parents[2] / "JPEGImages" / read["category"]
        names = read["src_imname"], read["trg_imname"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"correspondence.pairs: {file} is not an annotation of SPair-71k ({reason})") from error
    if points.shape[1:] != (2, 2) or not max(right - left, bottom - top) > 0:
        raise UserError(f"correspondence.pairs: {file} has no key points, or no box of the second image")
    first, second = (opened(folder / name) for name in names)
    return Pair(first, second, points, float(max(right - left, bottom - top)))


def _moved(scenes: SampleScenes, number: int) -> Pair:
    """A scene, and itself turned, zoomed, shifted, and in other colours; key points lie on the dominant object."""
    scene, side = scenes.scene(number), scenes.size
    random = np.random.default_rng([scenes.seed, number])
    angle, zoom = np.deg2rad(random.uniform(-TURN, TURN)), random.uniform(*ZOOM)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.full(2, side / 2)
    shift = middle + random.uniform(-SHIFT, SHIFT, 2) * side - turn @ middle
    back = np.linalg.inv(turn)
    # PIL asks where each pixel of the result comes from.
    places = np.concatenate([back, (-back @ shift)[:, None]], axis=1).ravel().tolist()

    def move(image: Image.Image, fill: int | tuple[int, ...], resample: Image.Resampling) -> Image.Image:
        return image.transform((side, side), Image.Transform.AFFINE, places, resample, fillcolor=fill)

    grey = (128, 128, 128)
    second = np.asarray(move(Image.fromarray(scene.image), grey, Image.Resampling.BICUBIC), np.float32)
    second = np.clip(second * random.uniform(0.8, 1.2, 3) + random.uniform(-20, 20, 3), 0, 255).astype(np.uint8)
    rows, columns = np.nonzero(scene.masks[0])
    chosen = random.choice(len(rows), min(POINTS, len(rows)), replace=False)
    start = np.stack([columns[chosen] + 0.5, rows[chosen] + 0.5], axis=1)
    end = start @ turn.T + shift
    inside = ((end >= 0) & (end < side)).all(axis=1)
    box = move(Image.fromarray(scene.masks[0].astype(np.uint8) * 255), 0, Image.Resampling.NEAREST).getbbox()
    left, top, right, bottom = box or (0, 0, side, side)
    points = np.stack([start, end], axis=1)[inside].astype(np.float32)
    return Pair(Image.fromarray(scene.image), Image.fromarray(second), points, float(max(right - left, bottom - top)))
