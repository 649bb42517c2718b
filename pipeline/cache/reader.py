"""The aligned shard reader: images and every teacher's features side by side, joined by key, shuffled, resumable.

A training worker reads row groups itself, ahead of time, on threads. The order of an epoch is a function of (seed,
epoch, rank, world) alone: row groups are permuted over the whole dataset and dealt to the ranks, then rows are
permuted within a window of row groups. A position is therefore a batch number, and skipping to it reads nothing that
is not needed. This module imports neither Ray nor MLflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import CachedTeacher, load_tokens
from pipeline.cache.shards import ROW_GROUP_SIZE, ShardFolder, ShardRecord
from pipeline.cache.spine import check_rows, views_of
from pipeline.errors import UserError
from pipeline.prefetch import map_ahead
from pipeline.views import View, decode_image, render

NO_LABEL = -1
"""Label of a sample that has none."""


@dataclass(frozen=True)
class Batch:
    """What one training step consumes.

    Attributes:
        keys: B sample ids.
        images: [B, 3, H, W] uint8 RGB.
        labels: [B] int64, `NO_LABEL` where there is none.
        features: by teacher id and token type (``summary``, ``patches``), [B, row_bytes] uint8 as stored.
    """

    keys: list[str]
    images: Tensor
    labels: Tensor
    features: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Unit:
    """One row group: shard, number in its file, rows of the view."""

    shard: int
    group: int
    rows: int


@dataclass(frozen=True)
class _Rows:
    """A row group in memory; row r is a view of image r // (rows per image)."""

    keys: list[str]
    views: list[View]
    labels: np.ndarray
    images: pa.ChunkedArray
    features: dict[str, dict[str, np.ndarray]]


class CacheReader:
    """Reads a dataset with the teachers in use, and no other teacher's bytes.

    Args:
        dataset: whose `images` shards are complete.
        teachers: whose shards are complete.
        image_size: side of the student's square input in pixels.
        batch_size: images per batch on this rank.
        seed: of the order.
        window: images shuffled together after the shuffle of row groups.
        rank, world: of this training worker.
        threads: that decode images.

    Raises:
        UserError: where shards are missing, or no rank would get a full batch.
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
    ) -> None:
        self.image_size, self.batch_size, self.seed, self.window = image_size, batch_size, seed, window
        self.rank, self.world = rank, world
        self.dataset = dataset
        self.image_records = _complete(dataset, dataset.images, "images")
        self.row_records = _complete(dataset, dataset.rows, "views") if dataset.policy.crops else {}
        self.teachers = {t.id: _TeacherShards(dataset, t) for t in teachers}
        self.units = _units(self.image_records, dataset.policy.rows_per_image)
        self.io = ThreadPoolExecutor(1)
        self.assembler = ThreadPoolExecutor(1)
        self.decoders = ThreadPoolExecutor(threads)
        if not self.steps(0):
            rows = sum(unit.rows for unit in self.units)
            raise UserError(
                f"{dataset.location} has {rows} readable images in {len(self.units)} row groups: too few for "
                f"{world} training workers of {batch_size} images each; lower train.batch_size or train.workers"
            )

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, equal on every rank; the rows that fill no batch are left out of that epoch."""
        order = self._unit_order(epoch)
        rows = [sum(self.units[i].rows for i in order[rank :: self.world]) for rank in range(self.world)]
        return min(rows) // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on this rank from number `start` on.

        Raises:
            UserError: where a teacher's keys are not those of the images, naming shard and key.
        """
        units = [self.units[i] for i in self._unit_order(epoch)[self.rank :: self.world]]
        refs, window_start = self._row_order(units, epoch)
        work = self._load(units, refs, window_start, range(start, self.steps(epoch)))
        yield from map_ahead(self.assembler, self._assemble, work, ahead=2)

    def _unit_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.units))

    def _row_order(self, units: Sequence[_Unit], epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(unit position, row in unit) in training order [R, 2], and for each the first unit of its window [R]."""
        order, starts, first = [], [], 0
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        while first < len(units):
            last, rows = first, 0
            while last < len(units) and (rows == 0 or rows + units[last].rows <= self.window):
                rows += units[last].rows
                last += 1
            refs = [(position, row) for position in range(first, last) for row in range(units[position].rows)]
            order.append(rng.permutation(np.array(refs, dtype=np.int64).reshape(-1, 2)))
            starts.append(np.full(len(refs), first))
            first = last
        return np.concatenate(order), np.concatenate(starts)

    def _load(
        self, units: Sequence[_Unit], refs: np.ndarray, window_start: np.ndarray, steps: range
    ) -> Iterator[list[tuple[_Rows, int]]]:
        """Rows of each batch, as references into row groups that are read ahead and let go once their window is past."""
        if not steps:
            return
        loaded: dict[int, _Rows] = {}
        position = int(window_start[steps.start * self.batch_size])
        ahead = max(2, self.window // max(unit.rows for unit in units))
        reading = map_ahead(self.io, self._read, units[position:], ahead)
        for step in steps:
            chosen = slice(step * self.batch_size, (step + 1) * self.batch_size)
            while position <= refs[chosen, 0].max():
                loaded[position] = next(reading)
                position += 1
            for past in [p for p in loaded if p < window_start[chosen.start]]:
                del loaded[past]
            yield [(loaded[unit], row) for unit, row in refs[chosen].tolist()]

    def _read(self, unit: _Unit) -> _Rows:
        images = self.dataset.images.read_group(self.image_records[unit.shard], unit.group)
        rows = self._read_rows(unit, images)
        features = {name: shards.read(unit, rows) for name, shards in self.teachers.items()}
        labels = images["label"].fill_null(NO_LABEL).to_numpy()
        labels = labels.repeat(self.dataset.policy.rows_per_image)
        return _Rows(rows["sample_id"].to_pylist(), views_of(rows), labels, images["image"], features)

    def _read_rows(self, unit: _Unit, images: pa.Table) -> pa.Table:
        if not self.row_records:
            return images
        rows = self.dataset.rows.read_group(self.row_records[unit.shard], unit.group)
        check_rows(self.dataset, unit.shard, rows, images)
        return rows

    def _assemble(self, rows: list[tuple[_Rows, int]]) -> Batch:
        pixels = list(self.decoders.map(self._render, rows))
        features = {
            name: {kind: _gather(name, kind, rows) for kind in shards.teacher.shapes}
            for name, shards in self.teachers.items()
        }
        labels = np.array([group.labels[row] for group, row in rows], dtype=np.int64)
        keys = [group.keys[row] for group, row in rows]
        return Batch(keys, torch.from_numpy(np.stack(pixels)), torch.from_numpy(labels), features)

    def _render(self, ref: tuple[_Rows, int]) -> np.ndarray:
        group, row = ref
        image = group.images[row // self.dataset.policy.rows_per_image].as_py()
        return _student_pixels(image, group.views[row], self.image_size)


def scan_images(dataset: Dataset, image_size: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Images and labels without features, in stored order: all of them, or about `limit` in evenly spaced row groups."""
    records = _complete(dataset, dataset.images, "images")
    with ThreadPoolExecutor(2) as pool:
        for unit in _spaced(_units(records), limit):
            table = dataset.images.read_group(records[unit.shard], unit.group)
            work = [
                (data.as_py(), view, image_size) for data, view in zip(table["image"], views_of(table), strict=True)
            ]
            pixels = torch.from_numpy(np.stack(list(pool.map(_student_pixels, *zip(*work, strict=True)))))
            for first in range(0, unit.rows, batch_size):
                part = table.slice(first, batch_size)
                yield Batch(part["sample_id"].to_pylist(), pixels[first : first + batch_size], _labels(part), {})


def read_summaries(dataset: Dataset, teacher: CachedTeacher, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """One cached vector an image: the summary, or the mean of the patches where the teacher has no summary.

    Returns:
        [N, D] float32 and the labels [N] int64, of the first view of the images that :func:`scan_images` gives for the
        same `limit`.
    """
    records = _complete(dataset, dataset.images, "images")
    shards, views = _TeacherShards(dataset, teacher), dataset.policy.rows_per_image
    kind = "summary" if teacher.summary_shape else "patches"
    tokens = load_tokens(dataset, teacher)[kind]
    features, labels = [], []
    for unit in _spaced(_units(records), limit):
        images = dataset.images.read_group(records[unit.shard], unit.group, ["sample_id", "label"])
        table = shards.read_table(unit, [kind])
        if table["sample_id"].to_pylist()[::views] != images["sample_id"].to_pylist():
            raise shards.mismatch(unit, images["sample_id"].to_pylist(), table["sample_id"].to_pylist()[::views])
        values = tokens.decode(torch.from_numpy(_fixed_width(table[kind])[::views].copy()))
        features.append(values if kind == "summary" else values.mean(dim=(1, 2)))
        labels.append(_labels(images))
    return torch.cat(features), torch.cat(labels)


def _spaced(units: list[_Unit], limit: int | None) -> list[_Unit]:
    count = len(units) if limit is None else min(len(units), max(1, limit // ROW_GROUP_SIZE))
    return [units[i] for i in np.linspace(0, len(units) - 1, count).round().astype(int)]


class _TeacherShards:
    """One teacher's side of the join."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        self.teacher = teacher
        self.folder = dataset.teacher(teacher.id)
        self.records = _complete(dataset, self.folder, teacher.id)

    def read(self, unit: _Unit, rows: pa.Table) -> dict[str, np.ndarray]:
        """[n, row_bytes] uint8 by token type, for the keys of `rows`."""
        table = self.read_table(unit, list(self.teacher.shapes))
        if not (rows["sample_id"].equals(table["sample_id"]) and rows["view"].equals(table["view"])):
            raise self.mismatch(unit, _keys(rows), _keys(table))
        return {kind: _fixed_width(table[kind]) for kind in self.teacher.shapes}

    def read_table(self, unit: _Unit, kinds: list[str]) -> pa.Table:
        """A row group's keys and these token types."""
        return self.folder.read_group(self.records[unit.shard], unit.group, ["sample_id", "view", *kinds])

    def mismatch(self, unit: _Unit, due: Sequence[object], found: Sequence[object]) -> UserError:
        """The error for a shard that does not hold the keys that it should."""
        unlike = next(
            ((a, b) for a, b in zip(due, found, strict=False) if a != b), (f"{len(due)} rows", f"{len(found)} rows")
        )
        return UserError(
            f"shard {unit.shard} of {self.teacher.id} does not hold the keys of its images: {unlike[1]} where {unlike[0]} "
            f"is due; delete {self.folder.store.uri}/shard-{unit.shard:05d}.json and run the job again"
        )


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["sample_id"].to_pylist(), table["view"].to_pylist(), strict=True))


def _complete(dataset: Dataset, folder: ShardFolder, name: str) -> dict[int, ShardRecord]:
    records = folder.records()
    if len(records) != dataset.shards:
        raise UserError(
            f"{name} has {len(records)} of {dataset.shards} shards in {folder.store.uri}: run jobs/precompute.py with this recipe"
        )
    return records


def _units(records: dict[int, ShardRecord], rows_per_image: int = 1) -> list[_Unit]:
    return [
        _Unit(record.shard, group, min(ROW_GROUP_SIZE, record.rows - group * ROW_GROUP_SIZE) * rows_per_image)
        for record in records.values()
        for group in range(-(-record.rows // ROW_GROUP_SIZE))
    ]


def _fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """A ``fixed_size_binary`` column as [N, width] uint8, read-only and without a copy."""
    array = column.combine_chunks()
    width = array.type.byte_width
    if not len(array):
        return np.empty((0, width), np.uint8)
    rows = np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, width)
    return rows[array.offset : array.offset + len(array)]


def _labels(table: pa.Table) -> Tensor:
    return torch.from_numpy(table["label"].fill_null(NO_LABEL).to_numpy().copy())


def _student_pixels(data: bytes, view: View, size: int) -> np.ndarray:
    return render(decode_image(data), view, (size, size), "bicubic").transpose(2, 0, 1)


def _gather(teacher: str, kind: str, rows: list[tuple[_Rows, int]]) -> Tensor:
    return torch.from_numpy(np.stack([group.features[teacher][kind][row] for group, row in rows]))
