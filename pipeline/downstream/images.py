"""Images and labels from any source, decoded by row; training and held-out classes must agree."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from pipeline.downstream.base import Examples, Split
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS, decode_image, image_size
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.progress import Progress
from pipeline.sources.base import Source, odd_class
from pipeline.sources.left_out import LeftOut, notes_of
from pipeline.sources.listing import images_in
from pipeline.sources.locations import SAMPLES
from pipeline.sources.open import open_images
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.storage.files import HEADER, THREADS, open_binary, read_bytes
from pipeline.storage.remote import is_uri

T = TypeVar("T")

PARQUET_BLOCK = 128
"""Rows of a Parquet file that stay together in the shuffle: reading one reads its whole row group."""


def split_location(config: FinetuneJobConfig, split: Split) -> str | None:
    """Where the images of a split are; None if there are no held-out images.

    Raises:
        UserError: if a share of the training images is to be held out.
    """
    if config.data.share:
        raise UserError(
            f"data.val={config.data.val}: a share is held out of labelled images only; name held-out images"
        )
    return config.data.train if split == "train" else config.data.held_out


def open_split(config: FinetuneJobConfig, split: Split) -> Source | None:
    """The source of `data.train` or `data.val`; None if there are no held-out images."""
    if split == "val" and config.data.held_out is None:
        return None
    return open_images(config.data, split, config.seed)


class Scenes:
    """Generated scenes in rows, for a task that adds their annotations."""

    block = 1

    def __init__(self, config: FinetuneJobConfig, split: Split) -> None:
        scenes = open_split(config, split)
        assert isinstance(scenes, SampleScenes)
        self.scenes, self.location, self.classes = scenes, scenes.location, scenes.classes

    def __len__(self) -> int:
        return self.scenes.count

    def key(self, row: int) -> str:
        """Number of a scene."""
        return f"scene-{row:08d}"

    def check(self) -> list[str]:
        """Generated scenes need no check."""
        return []


def image_files(folder: str) -> tuple[list[str], list[str]]:
    """The image files below a folder, by local path or URI, without hidden ones such as the `._photo.jpg` that macOS writes;
    and notes on what else was left out.

    Raises:
        UserError: if there are none, or a folder cannot be listed.
    """
    left_out = LeftOut()
    (files,) = images_in([folder], left_out, folder)
    found, notes = files["uri"].to_pylist(), left_out.all_notes()
    if not found:
        others = f"; left out: {'; '.join(notes)}" if notes else ""
        raise UserError(f"{folder}: no images found; looked for {', '.join(IMAGE_EXTENSIONS)}{others}")
    return found, notes


def decode(data: bytes | Exception, name: str) -> Image.Image:
    """Upright RGB pixels.

    Raises:
        UserError: naming the image and the reason.
    """
    try:
        if isinstance(data, Exception):
            raise data
        return decode_image(data)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{name}: {error}; fetch it again or remove it") from error


def read_pixels(path: str) -> Tensor:
    """Upright RGB pixels of a file by local path or URI, uint8 [3, H, W]; raises as :func:`decode`."""
    try:
        data: bytes | Exception = read_bytes(path)
    except OSError as error:
        data = error
    return pil_to_tensor(decode(data, path))


def read_rows(examples: Any, rows: Sequence[int]) -> Iterator[Any]:
    """`examples.read` of each row, in order; on threads if a store holds the images, since each read waits for the network."""
    if not is_uri(examples.location):
        yield from map(examples.read, rows)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from map_ahead(pool, examples.read, rows, THREADS)


class SourceImages:
    """The images of a source, in rows."""

    classes: tuple[str, ...] = ()

    def __init__(self, source: Source) -> None:
        self.source, self.location = source, source.location
        self.block = 1 if source.random_access else PARQUET_BLOCK
        self.index = source.index()

    def __len__(self) -> int:
        return self.index.num_rows

    def key(self, row: int) -> str:
        """Sample id of a row."""
        return str(self.index["sample_id"][row].as_py())

    def check(self) -> list[str]:
        """Refuse an empty file; whether pixels decode shows only when they are read. Returns what the source left out.

        Raises:
            UserError: naming the first such file.
        """
        sizes = self.index["size"].to_numpy()
        empty = np.flatnonzero((sizes == 0) & (self.location != SAMPLES))
        if len(empty):
            raise UserError(f"{self.location}: {self.key(int(empty[0]))} is empty or cannot be read; fetch it again")
        return notes_of(self.index)

    def images(self, rows: Sequence[int]) -> list[Image.Image]:
        """Upright RGB images of rows, read in ascending order.

        Raises:
            UserError: naming an image that cannot be read or decoded.
        """
        order = np.argsort(rows, kind="stable")
        decoded = {}
        read = self.source.read(self.index.take(np.asarray(rows)[order]))
        for position, data in zip(order.tolist(), read, strict=True):
            decoded[position] = decode(data, f"{self.location}: {self.key(rows[position])}")
        return [decoded[position] for position in range(len(rows))]


class LabelledImages(SourceImages):
    """Images with labels; `classes` names the labels of a source without names, by default the numbers themselves."""

    def __init__(self, source: Source, classes: tuple[str, ...] = ()) -> None:
        super().__init__(source)
        labels = self.index["label"]
        if labels.null_count:
            first = self.key(pc.index(labels.is_null(), True).as_py())
            notes = "".join(f"; {note}" for note in notes_of(self.index))
            raise UserError(f"{self.location}: {first} has no label; classification needs one for every image{notes}")
        self.labels: np.ndarray = labels.to_numpy()
        self.classes = source.classes or classes or tuple(map(str, range(int(self.labels.max()) + 1)))

    def check(self) -> list[str]:
        """Refuse a label beyond the classes, and an empty file; a note on classes without an image."""
        beyond = np.flatnonzero(self.labels >= len(self.classes))
        if len(beyond):
            row = int(beyond[0])
            raise UserError(
                f"{self.location}: {self.key(row)} has label {self.labels[row]}, but there are {len(self.classes)} classes"
            )
        absent = [self.classes[label] for label in sorted({*range(len(self.classes))} - {*self.labels.tolist()})]
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        named = f"{len(absent)} of {len(self.classes)} classes have no image: {', '.join(absent[:5])}{more}"
        return [*super().check(), *([named] if absent else [])]


def open_labelled(config: FinetuneJobConfig, split: Split, classes: Sequence[str] = ()) -> LabelledImages | None:
    """A split for classification; `classes` as in :class:`LabelledImages`."""
    source = open_split(config, split)
    return None if source is None else LabelledImages(source, tuple(classes))


def refuse_other_classes(expected: Sequence[str], found: Sequence[str], whose: str, location: str) -> None:
    """Refuse two lists of classes that differ.

    Raises:
        UserError: naming the classes that only one of them has, or the first of another place.
    """
    if (odd := odd_class(expected, found)) is not None:
        counts = f"{len(expected)} and {len(found)}" if len(expected) != len(found) else f"{len(found)} each"
        raise UserError(f"{whose} and {location} differ in their classes ({counts}): {odd}")


def origins(data: Examples) -> Iterator[tuple[str, int]]:
    """For every row, the file that holds its image, links resolved, and the place in it."""
    if isinstance(data, SourceImages):
        files, places = data.index["uri"].to_pylist(), data.index["offset"].to_pylist()
    else:
        files, places = [os.path.join(data.location, data.key(row)) for row in range(len(data))], [0] * len(data)
    if is_uri(data.location):
        yield from zip(files, places, strict=True)
        return
    folders: dict[str, str] = {}
    for file, place in zip(files, places, strict=True):
        folder, name = os.path.split(file)
        real = folders.get(folder) or folders.setdefault(folder, os.path.realpath(folder))
        path = os.path.join(real, name)
        yield os.path.realpath(path) if os.path.islink(path) else path, place


def refuse_same_images(train: Examples, val: Examples) -> None:
    """Refuse held-out images that are training images too, also by links to files or folders.

    Raises:
        UserError: with their number and the first one.
    """
    if SAMPLES in (train.location, val.location):
        return
    known = set(origins(train))
    both = [row for row, origin in enumerate(origins(val)) if origin in known]
    if both:
        raise UserError(
            f"data.val ({val.location}): {len(both)} of its {len(val)} images are images of data.train too, first "
            f"{val.key(both[0])}; name other images, or none (data.val=none)"
        )


def size_on_disk(path: str) -> tuple[int, int]:
    """(width, height) of an upright image file, by local path or URI.

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it cannot be read.
    """
    try:
        with open_binary(path, HEADER) as file:
            return image_size(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); fetch it again or remove it") from error


def check_rows(check: Callable[[int], T], count: int) -> list[T]:
    """Call `check` for every row on threads; returns its results, and raises what the first bad row raises."""
    results = []
    with ThreadPoolExecutor(THREADS) as pool, Progress(count, "img", "checking data") as progress:
        for result in pool.map(check, range(count)):
            results.append(result)
            progress.update()
    return results
