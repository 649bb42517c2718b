"""The cache reader of a training worker: images and every teacher's features, joined by key, shuffled, resumable.

A training worker reads row groups itself, ahead of time, on threads. The order of an epoch is known before anything is
read (`order.py`): a resumed epoch reads only what it still needs, and the rows of a row group are copied into their batches
as soon as it is read, while they are in the processor's cache. Imports neither Ray nor MLflow.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, fixed_width, in_one_piece
from pipeline.cache.layout.shares import PRESENT, with_features
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, check_rows, geometry_columns, view_of
from pipeline.cache.read.order import EpochOrder, ShuffleQuality, check_per_step
from pipeline.cache.read.shard_reader import FeatureReader, SampleReader, ShardReader, image_reader
from pipeline.errors import UserError
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, Partner
from pipeline.imaging.geometry import View
from pipeline.imaging.gpu_decode import NvjpegPool
from pipeline.imaging.shared_arrays import ArrayHandle
from pipeline.runtime.prefetch import map_ahead
from teachers.base import Interpolation

STUDENT_INTERPOLATION: Interpolation = "bicubic"
"""How images are resized for the student."""
IO_THREADS = 2
"""Threads that read row groups."""
BATCHES_AHEAD = 2
"""Batches whose images are decoded ahead of use."""


@dataclass(frozen=True)
class Batch:
    """The input of one training step.

    Attributes:
        keys: B sample ids; rows of one row group are adjacent, in the order of the shuffle.
        images: [B, 3, H, W] uint8 RGB.
        labels: [B] int64, `NO_LABEL` for a sample without one.
        features: [B, row_bytes] uint8 as stored, by teacher id and token type (``summary``, ``patches``). Of a teacher that is
            asked about a share of the images, rows of others are 0, and ``present`` [B] uint8 is 1 for those that are not.
        position: (epoch, number) in training order.
    """

    keys: list[str]
    images: Tensor
    labels: Tensor
    features: dict[str, dict[str, Tensor]]
    position: tuple[int, int] = (0, 0)


@dataclass
class PartialBatch:
    """A `Batch` before its images are decoded; row groups fill disjoint slices of its B rows.

    Attributes:
        images: B encoded images.
        geometry: [B, G] float32, the values of every view by `geometry_columns`.
        partners: encoded image, view and share of what a view is mixed with.
        assigned: rows that are assigned to a row group.
    """

    position: tuple[int, int]
    keys: list[str]
    images: list[pa.Scalar]
    labels: np.ndarray
    geometry: np.ndarray
    features: dict[str, dict[str, np.ndarray]]
    partners: list[tuple[pa.Scalar, View, float] | None]
    assigned: int = 0

    def assign(self, count: int) -> slice:
        """Assign the next `count` rows."""
        self.assigned += count
        return slice(self.assigned - count, self.assigned)


RowSlice = tuple[PartialBatch, slice, np.ndarray]
"""A batch, rows in it, and the numbers of the rows of a row group to copy there."""


class CacheReader:
    """Reads a dataset with the features of some of its teachers.

    Args:
        dataset: whose `images` shards are complete.
        teachers: whose shards are complete; no other teacher's files are read.
        image_size: side of the student's square input in pixels.
        batch_size: images per batch on this rank.
        window: images that are shuffled together, after the shuffle of the row groups.
        rank, world: this training worker's number and the number of workers.
        threads: number of image decoders.
        processes: whether the decoders are processes instead of threads, as they should be on a machine with a GPU.
        nvjpeg: the GPU (``cuda:<index>``) that decodes JPEGs; None: only those decoders.
        per_step: views of an image in one batch, in adjacent rows; must divide its views and the batch size.

    Raises:
        UserError: if shards are missing, a rank would not get a full batch, or `per_step` does not divide.
    """

    def __init__(
        self,
        dataset: Dataset,
        teachers: Sequence[CachedTeacher],
        *,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        window: int = 1024,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        processes: bool = False,
        nvjpeg: str | None = None,
        per_step: int = 1,
    ) -> None:
        views = dataset.policy.rows_per_image
        check_per_step(per_step, views, batch_size)
        self.dataset, self.image_size, self.batch_size = dataset, image_size, batch_size
        self.samples, self.images = SampleReader(dataset), image_reader(dataset)
        self.rows = ShardReader(lambda part: part.rows, dataset, "views") if dataset.policy.crops else None
        self.geometry = geometry_columns(dataset.policy)
        self.teachers = {teacher.id: FeatureReader(dataset, teacher) for teacher in teachers}
        groups = dataset.row_groups()
        self.order = EpochOrder(groups, batch_size, seed, window, rank, world, per_step, views)
        self.io = ThreadPoolExecutor(IO_THREADS)
        self.assembler = ThreadPoolExecutor(BATCHES_AHEAD + 1)
        self.decoders = NvjpegPool(nvjpeg) if nvjpeg else DecoderPool(threads, processes)
        self.arrays = self.decoders.arrays
        if not self.steps(0):
            raise UserError(
                f"{dataset.location} has {groups[:, 3].sum()} readable images in {len(groups)} row groups: "
                f"too few for {world} training workers of {batch_size} images each; lower train.batch_size or train.workers"
            )

    def close(self) -> None:
        """Shut down threads and processes after their current work."""
        for pool in (self.io, self.assembler):
            pool.shutdown(cancel_futures=True)
        self.decoders.close()

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, equal on every rank; rows that do not fill a batch are dropped from that epoch."""
        return self.order.steps(epoch)

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well this rank's rows of an epoch are shuffled, computed without reading any file."""
        return self.order.shuffle_quality(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on this rank from number `start` on.

        Raises:
            UserError: if a file is damaged, or a shard's keys are not those of the images; names the shard and a key.
        """
        partial = self._partial_batches(epoch, range(start, self.steps(epoch)))
        yield from map_ahead(self.assembler, self._finish, partial, BATCHES_AHEAD)

    def _partial_batches(self, epoch: int, steps: range) -> Iterator[PartialBatch]:
        """The batches of these steps, images still encoded; row groups are read ahead."""
        if not steps:
            return
        work = _Work(self, epoch, steps)
        read, latest = map_ahead(self.io, self._read_group, work.items(), work.ahead), -1
        for step in steps:
            while step >= work.assigned or latest < work.last_item[step]:
                latest = next(read)
            del work.last_item[step]
            yield work.partial.pop(step)

    def empty_batch(self, epoch: int, step: int) -> PartialBatch:
        """The batch of a step before anything is read."""
        count = self.batch_size
        features = {
            name: {kind: self.arrays.empty(count, width) for kind, width in reader.widths.items()}
            | ({PRESENT: self.arrays.empty(count)} if self._is_partial(reader) else {})
            for name, reader in self.teachers.items()
        }
        labels, geometry = np.empty(count, np.int64), np.empty((count, len(self.geometry)), np.float32)
        nothing: list[Any] = [None] * count
        return PartialBatch((epoch, step), [""] * count, nothing, labels, geometry, features, [*nothing])

    def _is_partial(self, reader: FeatureReader) -> bool:
        """Whether rows may lack features of a teacher: beyond its share, or mixed with images that are no samples."""
        return reader.share < 1 or bool(self.dataset.policy.mixup)

    def _read_group(self, work: tuple[int, RowGroup, list[RowSlice]]) -> int:
        """Read a row group and copy its rows into their batches; returns its number."""
        number, group, slices = work
        columns = [] if self.rows else ROWS_SCHEMA.names[1:]
        samples, images = self.samples.read(group), self.images.read(group, ["key", "image", *columns])
        rows = images
        if self.rows:
            rows = self.rows.read(group)
            check_rows(self.dataset.parts[group.part], group.shard, rows, images)
        encoded, views = in_one_piece(images["image"]), self.dataset.policy.rows_per_image
        geometry = np.stack([rows[name].to_numpy() for name in self.geometry], axis=1)
        partners, usable = self._mixed(images, rows, encoded, geometry, samples.rows)
        stored: list[RowSlice] = []
        for batch, target, chosen in slices:
            owners = chosen // views
            stored.append((batch, target, samples.rows[owners] * views + chosen % views))
            batch.keys[target] = [samples.names[owner] for owner in owners]
            batch.images[target] = [encoded[row] for row in samples.rows[owners]]
            batch.labels[target] = samples.labels[owners]
            batch.geometry[target] = geometry[stored[-1][2]]
            if partners:
                batch.partners[target] = [partners[row] for row in stored[-1][2].tolist()]
        for name, reader in self.teachers.items():
            table = reader.read_aligned(group, rows)
            present = with_features(table["patches"]) & usable if self._is_partial(reader) else None
            if present is not None:
                for batch, target, chosen in stored:
                    batch.features[name][PRESENT][target] = present[chosen]
            for kind in reader.widths:
                source = fixed_width(table[kind])
                if present is not None:  # zeros can be decoded: what a null holds need not be a number
                    source = np.where(present[:, None], source, 0)
                for batch, target, chosen in stored:
                    # With mode="raise" numpy copies through a buffer of its own.
                    np.take(source, chosen, axis=0, out=batch.features[name][kind][target], mode="clip")
        return number

    def _mixed(
        self, images: pa.Table, rows: pa.Table, encoded: pa.Array, geometry: np.ndarray, chosen: np.ndarray
    ) -> tuple[list[tuple[pa.Scalar, View, float] | None], np.ndarray]:
        """What the rows of a row group are mixed with, and which of them ([R] bool) can be used.

        An image that is no sample of the data set, `chosen` being those that are, must not be seen: what is mixed with it is
        given as it is, without the features of the blend.
        """
        usable = np.ones(len(geometry), bool)
        if not self.dataset.policy.mixup:
            return [], usable
        places, views = {key: n for n, key in enumerate(images["key"].to_pylist())}, self.dataset.policy.rows_per_image
        own, found = set(chosen.tolist()), list[tuple[pa.Scalar, View, float] | None]()
        for row, (key, share) in enumerate(zip(rows["partner"].to_pylist(), rows["mix"].to_pylist(), strict=True)):
            usable[row] = key is None or places[key] in own
            place = places[key] if key is not None and usable[row] else None
            view = None if place is None else view_of(*geometry[place * views + row % views].tolist())
            found.append(None if place is None or view is None else (encoded[place], view, share))
        return found, usable

    def _finish(self, partial: PartialBatch) -> Batch:
        features = {
            name: {kind: torch.from_numpy(rows) for kind, rows in kinds.items()}
            for name, kinds in partial.features.items()
        }
        images, labels = self._decode_images(partial), torch.from_numpy(partial.labels)
        return Batch(partial.keys, images, labels, features, partial.position)

    def _decode_images(self, partial: PartialBatch) -> Tensor:
        """[B, 3, H, W] uint8; adjacent views of one image are decoded once."""
        pixels = self.arrays.empty(self.batch_size, 3, self.image_size, self.image_size)
        crops = list(map(_crop_task, partial.geometry.tolist(), self.arrays.row_targets(pixels), partial.partners))
        starts = [i for i, key in enumerate(partial.keys) if i == 0 or key != partial.keys[i - 1]]
        self.decoders.decode(
            [(partial.images[first].as_py(), crops[first:last]) for first, last in pairwise([*starts, self.batch_size])]
        )
        return torch.from_numpy(pixels)


class _Work:
    """What is read for some steps of an epoch, window by window.

    Attributes:
        partial: batches whose rows are assigned to row groups, by step.
        last_item: number of the last item that fills a batch, by step.
        assigned: all steps before this one are assigned completely.
        ahead: items to read ahead.
    """

    def __init__(self, reader: CacheReader, epoch: int, steps: range) -> None:
        self.reader, self.epoch, self.steps = reader, epoch, steps
        self.partial: dict[int, PartialBatch] = {}
        self.last_item: dict[int, int] = {}
        self.assigned = 0
        self.ahead = max(2, reader.order.window // (ROW_GROUP_SIZE * reader.order.views))

    def items(self) -> Iterator[tuple[int, RowGroup, list[RowSlice]]]:
        """Numbered row groups, and where their rows go."""
        size, number = self.reader.batch_size, 0
        for window in self.reader.order.windows(self.epoch, self.steps.start * size):
            if window.first >= self.steps.stop * size:
                return
            by_group = np.argsort(window.rows[:, 0], kind="stable")
            ends = np.cumsum([group.rows for group in window.groups])
            for group, end in zip(window.groups, ends, strict=True):
                rows = by_group[end - group.rows : end]
                slices = list(self._slices(window.first + rows, window.rows[rows, 1], number))
                if slices:
                    yield number, group, slices
                    number += 1
            self.assigned = (window.first + len(window.rows)) // size

    def _slices(self, positions: np.ndarray, rows: np.ndarray, number: int) -> Iterator[RowSlice]:
        """Where the rows of a row group go that have these ascending positions in training order."""
        steps, starts = np.unique(positions // self.reader.batch_size, return_index=True)
        for step, some in zip(steps.tolist(), np.split(rows, starts[1:]), strict=True):
            if step in self.steps:
                if step not in self.partial:
                    self.partial[step] = self.reader.empty_batch(self.epoch, step)
                self.last_item[step] = number
                yield self.partial[step], self.partial[step].assign(len(some)), some


def _crop_task(
    geometry: Sequence[float], target: np.ndarray | ArrayHandle, mixed: tuple[pa.Scalar, View, float] | None
) -> CropTask:
    partner = mixed and Partner(mixed[0].as_py(), *mixed[1:])
    return CropTask(view_of(*geometry), STUDENT_INTERPOLATION, target, partner)
