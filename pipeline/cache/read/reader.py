"""The aligned shard reader: images and every teacher's features side by side, joined by key, shuffled, resumable.

A training worker reads row groups itself, ahead of time, on threads. The order of an epoch is a function of (seed,
epoch, rank, world) alone: row groups are permuted over the whole dataset and dealt to the ranks, then rows are
permuted within a window of row groups. A position is therefore a batch number, and skipping to it reads nothing that
is not needed.

What a row group gives to which batch is known before it is read. So its rows are copied to their places in the batches
at once, while they are in the processor's cache, and no row group is kept. This module imports neither Ray nor MLflow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import (
    ROW_GROUP_SIZE,
    ShardFolder,
    ShardRecord,
    fixed_width,
    in_one_piece,
    keys_of,
    selected,
)
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, check_rows, views_of
from pipeline.errors import UserError
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, decoder_count
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayHandle
from pipeline.runtime.prefetch import map_ahead
from pipeline.storage.store import report_damage
from teachers.base import Interpolation

NO_LABEL = -1
"""Label of a sample that has none."""

STUDENT_INTERPOLATION: Interpolation = "bicubic"
"""How images are resized for the student."""

IO_THREADS = 2
"""Row groups that are read at once."""

BATCHES_AHEAD = 2
"""Batches that are decoded at the same time as the one that is waited for."""

GROUPS_AHEAD = 4
"""Row groups that are rendered ahead where images are read without features."""


@dataclass(frozen=True)
class Batch:
    """What one training step consumes.

    Attributes:
        keys: B sample ids; those of one row group lie together, in the order of their draw.
        images: [B, 3, H, W] uint8 RGB.
        labels: [B] int64, `NO_LABEL` where there is none.
        features: by teacher id and token type (``summary``, ``patches``), [B, row_bytes] uint8 as stored.
        position: (epoch, number) in the order of training.
    """

    keys: list[str]
    images: Tensor
    labels: Tensor
    features: dict[str, dict[str, Tensor]]
    position: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RowGroup:
    """One row group: shard, number in its file, rows of the view."""

    shard: int
    group: int
    rows: int


@dataclass
class PartialBatch:
    """A batch in the making: B places, of which row groups fill their share, each a run of its own.

    Attributes:
        keys: sample ids.
        images: encoded.
        labels: [B] int64.
        geometry: [B, 5] float32, the box of every view and its mirroring.
        features: by teacher id and token type, [B, row_bytes] uint8.
        taken: places that are spoken for.
    """

    keys: list[str]
    images: list[pa.Scalar]
    labels: np.ndarray
    geometry: np.ndarray
    features: dict[str, dict[str, np.ndarray]]
    taken: int = 0

    def take(self, count: int) -> slice:
        """The next `count` places."""
        self.taken += count
        return slice(self.taken - count, self.taken)


RowSlice = tuple[PartialBatch, slice, np.ndarray]
"""A batch, places in it, and the numbers of the rows of a row group that belong there."""


@dataclass(frozen=True)
class ShuffleQuality:
    """How near an epoch's order is to a full shuffle.

    Attributes:
        rank_correlation: between stored and training position of the rows (Spearman, in [-1, 1]); a full shuffle has
            about 0.
        same_group: share of the pairs of rows within a batch that are of one row group.
        same_group_full: the same, expected of a full shuffle.
    """

    rank_correlation: float
    same_group: float
    same_group_full: float

    def __str__(self) -> str:
        return (
            f"rank correlation {self.rank_correlation:+.3f}, {self.same_group:.2%} of the pairs in a batch from one row "
            f"group, {self.same_group_full:.2%} in a full shuffle"
        )


def check_per_step(per_step: int, views: int, batch_size: int) -> None:
    """Refuse a number of views in a step that cuts an image's views, or a worker's step, into unequal parts.

    Args:
        per_step: views of an image in a step.
        views: of an image in the cache.
        batch_size: images of a worker's step.

    Raises:
        UserError: naming the fields.
    """
    if views % per_step or batch_size % per_step:
        raise UserError(
            f"views.per_step={per_step} must divide the {views} views of an image (views.crops) and the {batch_size} "
            "images of a worker's step (train.batch_size, train.workers)"
        )


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
        processes: whether those are processes, as they should be beside a GPU.
        per_step: views of an image in one batch, in adjacent rows; divides its views and the batch.

    Raises:
        UserError: where shards are missing, no rank would get a full batch, or `per_step` does not divide.
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
        per_step: int = 1,
    ) -> None:
        check_per_step(per_step, dataset.policy.rows_per_image, batch_size)
        self.image_size, self.batch_size, self.seed, self.window = image_size, batch_size, seed, window
        self.rank, self.world, self.per_step = rank, world, per_step
        self.dataset = dataset
        self.images = _Shards(dataset, dataset.images, "images")
        self.rows = _Shards(dataset, dataset.rows, "views") if dataset.policy.crops else None
        self.teachers = {teacher.id: _TeacherShards(dataset, teacher) for teacher in teachers}
        self.units = _units(self.images.records, dataset.policy.rows_per_image)
        self.io = ThreadPoolExecutor(IO_THREADS)
        self.assembler = ThreadPoolExecutor(BATCHES_AHEAD + 1)
        self.decoders = DecoderPool(threads, processes)
        self.arrays = self.decoders.arrays
        if not self.steps(0):
            rows = sum(unit.rows for unit in self.units)
            raise UserError(
                f"{dataset.location} has {rows} readable images in {len(self.units)} row groups: too few for "
                f"{world} training workers of {batch_size} images each; lower train.batch_size or train.workers"
            )

    def close(self) -> None:
        """End its threads and processes when what they are at is done."""
        for pool in (self.io, self.assembler):
            pool.shutdown(cancel_futures=True)
        self.decoders.close()

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, equal on every rank; the rows that fill no batch are left out of that epoch."""
        order = self._unit_order(epoch)
        rows = [sum(self.units[i].rows for i in order[rank :: self.world]) for rank in range(self.world)]
        return min(rows) // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on this rank from number `start` on.

        Raises:
            UserError: where a teacher's keys are not those of the images, naming shard and key; where a file is damaged.
        """
        units = [self.units[i] for i in self._unit_order(epoch)[self.rank :: self.world]]
        refs, window_start = self._row_order(units, epoch)
        drafts = self._drafts(units, refs, window_start, range(start, self.steps(epoch)))
        batches = map_ahead(self.assembler, self._finish, drafts, BATCHES_AHEAD)
        for number, batch in enumerate(batches, start):
            yield replace(batch, position=(epoch, number))

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well this rank's rows of an epoch are shuffled; found from the order alone, without reading anything."""
        order = self._unit_order(epoch)[self.rank :: self.world]
        refs, _ = self._row_order([self.units[i] for i in order], epoch)
        sizes = np.array([unit.rows for unit in self.units])
        stored = (sizes.cumsum() - sizes)[order][refs[:, 0]] + refs[:, 1]
        ranks = stored.argsort().argsort()
        batches = refs[: len(refs) // self.batch_size * self.batch_size, 0].reshape(-1, self.batch_size)
        correlation = float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])
        within = float(np.mean([_same_pairs(np.unique(batch, return_counts=True)[1]) for batch in batches]))
        return ShuffleQuality(correlation, within, _same_pairs(sizes[order]))

    def _unit_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.units))

    def _row_order(self, units: Sequence[RowGroup], epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(unit position, row in unit) in training order [R, 2], and for each the first unit of its window [R]."""
        order, starts, first = [], [], 0
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        while first < len(units):
            last, rows = first, 0
            while last < len(units) and (rows == 0 or rows + units[last].rows <= self.window):
                rows += units[last].rows
                last += 1
            sizes = [unit.rows for unit in units[first:last]]
            refs = np.stack(
                [np.repeat(np.arange(first, last), sizes), np.concatenate([np.arange(n) for n in sizes])], 1
            )
            order.append(self._shuffled(refs, rng))
            starts.append(np.full(rows, first))
            first = last
        return np.concatenate(order), np.concatenate(starts)

    def _shuffled(self, refs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The rows of a window in training order; those of one image are dealt into groups of `per_step`, anew each epoch."""
        if self.per_step == 1:
            return rng.permutation(refs)
        views = self.dataset.policy.rows_per_image
        rows = rng.permuted(refs[:, 1].reshape(-1, views), axis=1).reshape(-1)
        groups = np.stack([refs[:, 0], rows], axis=1).reshape(-1, self.per_step, 2)
        return rng.permutation(groups).reshape(-1, 2)

    def _drafts(
        self, units: Sequence[RowGroup], refs: np.ndarray, window_start: np.ndarray, steps: range
    ) -> Iterator[PartialBatch]:
        """The batches with everything but pixels; row groups are read ahead."""
        if not steps:
            return
        drafts: dict[int, PartialBatch] = {}
        first = int(window_start[steps.start * self.batch_size])
        ahead = max(2, self.window // max(unit.rows for unit in units))
        filling = map_ahead(self.io, self._fill, self._runs(units, refs, first, steps, drafts), ahead)
        filled = -1
        for step in steps:
            while filled < refs[step * self.batch_size : (step + 1) * self.batch_size, 0].max():
                filled = next(filling)
            yield drafts.pop(step)

    def _runs(
        self, units: Sequence[RowGroup], refs: np.ndarray, first: int, steps: range, drafts: dict[int, PartialBatch]
    ) -> Iterator[tuple[int, RowGroup, list[RowSlice]]]:
        """For each row group that is needed, from unit position `first` on: its runs in the batches of `steps`."""
        by_unit = np.argsort(refs[:, 0], kind="stable")
        ends = np.cumsum([unit.rows for unit in units])
        for position in range(first, len(units)):
            places = by_unit[ends[position] - units[position].rows : ends[position]]
            numbers, starts = np.unique(places // self.batch_size, return_index=True)
            runs = []
            for step, rows in zip(numbers.tolist(), np.split(refs[places, 1], starts[1:]), strict=True):
                if step in steps:
                    draft = drafts[step] if step in drafts else drafts.setdefault(step, self._draft())
                    runs.append((draft, draft.take(len(rows)), rows))
            if runs:
                yield position, units[position], runs

    def _draft(self) -> PartialBatch:
        count = self.batch_size
        features = {
            name: {kind: self.arrays.empty(count, width) for kind, width in shards.widths.items()}
            for name, shards in self.teachers.items()
        }
        return PartialBatch(
            [""] * count, [None] * count, np.empty(count, np.int64), np.empty((count, 5), np.float32), features
        )

    def _fill(self, work: tuple[int, RowGroup, list[RowSlice]]) -> int:
        """Read a row group and copy its rows to their places; returns the unit's position."""
        position, unit, runs = work
        columns = [] if self.rows else ROWS_SCHEMA.names[1:]
        images = self.images.read(unit, ["sample_id", "label", "image", *columns])
        rows = images
        if self.rows:
            rows = self.rows.read(unit)
            check_rows(self.dataset, unit.shard, rows, images)
        keys, labels, encoded = rows["sample_id"].to_pylist(), _labels(images), in_one_piece(images["image"])
        geometry = np.stack([rows[name].to_numpy() for name in ("left", "top", "right", "bottom", "flip")], axis=1)
        for draft, places, chosen in runs:
            owners = chosen // self.dataset.policy.rows_per_image
            draft.keys[places] = [keys[row] for row in chosen]
            draft.images[places] = [encoded[owner] for owner in owners]
            draft.labels[places] = labels[owners]
            draft.geometry[places] = geometry[chosen]
        for shards in self.teachers.values():
            shards.fill(unit, rows, runs)
        return position

    def _finish(self, draft: PartialBatch) -> Batch:
        features = {
            name: {kind: torch.from_numpy(rows) for kind, rows in kinds.items()}
            for name, kinds in draft.features.items()
        }
        return Batch(draft.keys, self._pixels(draft), torch.from_numpy(draft.labels), features)

    def _pixels(self, draft: PartialBatch) -> Tensor:
        pixels = self.decoders.empty(self.batch_size, 3, self.image_size, self.image_size)
        rows = self.decoders.row_targets(pixels)
        # Adjacent views of one image are decoded once.
        starts = [i for i, key in enumerate(draft.keys) if i == 0 or key != draft.keys[i - 1]]
        runs = [
            (draft.images[first].as_py(), [self._crop_task(draft, place, rows[place]) for place in range(first, last)])
            for first, last in pairwise([*starts, self.batch_size])
        ]
        self.decoders.render(runs)
        return torch.from_numpy(pixels)

    def _crop_task(self, draft: PartialBatch, place: int, pixels: np.ndarray | ArrayHandle) -> CropTask:
        left, top, right, bottom, flip = draft.geometry[place].tolist()
        return CropTask(View((left, top, right, bottom), bool(flip)), STUDENT_INTERPOLATION, pixels)


def scan_images(
    dataset: Dataset, image_size: int, batch_size: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Images and labels without features, in stored order: all of them, or about `limit` in evenly spaced row groups.

    Row groups are rendered ahead of their use. Of `world` ranks each takes every `world`-th, from `rank` on.
    """
    records = _complete(dataset, dataset.images, "images")
    with (
        closing(DecoderPool(decoder_count(), processes=torch.cuda.is_available())) as decoders,
        ThreadPoolExecutor(GROUPS_AHEAD) as pool,
    ):

        def drawn(unit: RowGroup) -> tuple[pa.Table, Tensor]:
            table = dataset.images.read_group(records[unit.shard], unit.group)
            pixels = decoders.empty(unit.rows, 3, image_size, image_size)
            places = decoders.row_targets(pixels)
            crops = [[CropTask(v, STUDENT_INTERPOLATION, p)] for v, p in zip(views_of(table), places, strict=True)]
            decoders.render(list(zip(table["image"].to_pylist(), crops, strict=True)))
            return table, torch.from_numpy(pixels)

        for table, images in map_ahead(pool, drawn, _spaced(_units(records), limit)[rank::world], GROUPS_AHEAD):
            for first in range(0, len(images), batch_size):
                part = table.slice(first, batch_size)
                labels = torch.from_numpy(_labels(part).copy())
                yield Batch(part["sample_id"].to_pylist(), images[first : first + batch_size], labels, {})


def has_labels(dataset: Dataset) -> bool:
    """Whether the first images of a dataset carry labels."""
    records = _complete(dataset, dataset.images, "images")
    first = _units(records)[0]
    return bool((_labels(dataset.images.read_group(records[first.shard], first.group, ["label"])) != NO_LABEL).any())


def read_summaries(
    dataset: Dataset, teacher: CachedTeacher, limit: int | None = None, shards: Collection[int] | None = None
) -> tuple[Tensor, Tensor]:
    """One cached vector an image: the summary, or the mean of the patches where the teacher has no summary.

    Args:
        limit: about how many images, evenly spaced; None: all.
        shards: of these shards alone; None: of all.

    Returns:
        [N, D] float32 and the labels [N] int64, of the first view of the images that :func:`scan_images` gives for the
        same `limit`.
    """
    records = _complete(dataset, dataset.images, "images")
    if shards is not None:
        records = {shard: record for shard, record in records.items() if shard in shards}
    stored, views = _TeacherShards(dataset, teacher), dataset.policy.rows_per_image
    kind = "summary" if teacher.summary_shape else "patches"
    codec = load_codecs(dataset, teacher)[kind]
    features, labels = [], []
    for unit in _spaced(_units(records), limit):
        images = dataset.images.read_group(records[unit.shard], unit.group, ["sample_id", "label"])
        table = stored.read(unit, ["sample_id", kind])
        if table["sample_id"].to_pylist()[::views] != images["sample_id"].to_pylist():
            raise stored.mismatch(unit, images["sample_id"].to_pylist(), table["sample_id"].to_pylist()[::views])
        values = codec.decode(torch.from_numpy(fixed_width(table[kind])[::views].copy()))
        features.append(values if kind == "summary" else values.mean(dim=(1, 2)))
        labels.append(torch.from_numpy(_labels(images).copy()))
    return torch.cat(features), torch.cat(labels)


class PatchReader:
    """The patches of a teacher, one row group after the other, without the images.

    Args:
        dataset: whose `images` shards are complete.
        teacher: whose shards are complete.

    Raises:
        UserError: where shards are missing.
    """

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        self._shards = _TeacherShards(dataset, teacher)
        self._units = _units(self._shards.records, dataset.policy.rows_per_image)
        self._codec = load_codecs(dataset, teacher)["patches"]

    def __len__(self) -> int:
        return len(self._units)

    @property
    def sizes(self) -> list[int]:
        """Rows of every row group."""
        return [unit.rows for unit in self._units]

    def read(self, number: int) -> tuple[list[str], Tensor]:
        """The sample ids of a row group and their patches [n, h, w, D] float32."""
        table = self._shards.read(self._units[number], ["sample_id", "patches"])
        patches = self._codec.decode(torch.from_numpy(fixed_width(table["patches"]).copy()))
        return table["sample_id"].to_pylist(), patches


def _spaced(units: list[RowGroup], limit: int | None) -> list[RowGroup]:
    count = len(units) if limit is None else min(len(units), max(1, limit // ROW_GROUP_SIZE))
    return [units[i] for i in np.linspace(0, len(units) - 1, count).round().astype(int)]


class _Shards:
    """The complete shards of a folder; the footer of a file is read once, the checksums of a row group are compared once."""

    def __init__(self, dataset: Dataset, folder: ShardFolder, name: str) -> None:
        self.folder, self.records = folder, _complete(dataset, folder, name)
        self.footers: dict[int, pq.FileMetaData] = {}
        self.sound: set[RowGroup] = set()

    def read(self, unit: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """A row group."""
        name = self.records[unit.shard].file
        how = {"metadata": self.footers.get(unit.shard), "page_checksum_verification": unit not in self.sound}
        with (
            report_damage(f"{self.folder.store.uri}/{name}"),
            pq.ParquetFile(self.folder.store.open(name), **how) as opened,
        ):
            table = selected(opened.read_row_group(unit.group, columns=columns, use_threads=False), columns)
            self.footers[unit.shard] = opened.metadata
            self.sound.add(unit)
            return table


class _TeacherShards(_Shards):
    """One teacher's side of the join."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        super().__init__(dataset, dataset.teacher(teacher.id), teacher.id)
        self.teacher = teacher
        self.widths = {kind: codec.row_bytes for kind, codec in load_codecs(dataset, teacher).items()}

    def fill(self, unit: RowGroup, rows: pa.Table, runs: list[RowSlice]) -> None:
        """Copy the features of a row group, which is that of the keys of `rows`, to their places."""
        table = self.read(unit, ["sample_id", "view", *self.widths])
        if not (rows["sample_id"].equals(table["sample_id"]) and rows["view"].equals(table["view"])):
            raise self.mismatch(unit, keys_of(rows), keys_of(table))
        for kind in self.widths:
            source = fixed_width(table[kind])
            for draft, places, chosen in runs:
                # Under mode="raise" numpy would go through a buffer of its own.
                np.take(source, chosen, axis=0, out=draft.features[self.teacher.id][kind][places], mode="clip")

    def mismatch(self, unit: RowGroup, due: Sequence[object], found: Sequence[object]) -> UserError:
        """The error for a shard that does not hold the keys that it should."""
        unlike = next(
            ((a, b) for a, b in zip(due, found, strict=False) if a != b), (f"{len(due)} rows", f"{len(found)} rows")
        )
        return UserError(
            f"shard {unit.shard} of {self.teacher.id} does not hold the keys of its images: {unlike[1]} where {unlike[0]} "
            f"is due; delete {self.folder.store.uri}/shard-{unit.shard:05d}.json and run the job again"
        )


def _complete(dataset: Dataset, folder: ShardFolder, name: str) -> dict[int, ShardRecord]:
    records = dataset.records(folder)
    if len(records) != dataset.shards:
        raise UserError(
            f"{name} has {len(records)} of {dataset.shards} shards in {folder.store.uri}: run jobs/precompute.py with this recipe"
        )
    return records


def _units(records: dict[int, ShardRecord], rows_per_image: int = 1) -> list[RowGroup]:
    return [
        RowGroup(record.shard, group, min(ROW_GROUP_SIZE, record.rows - group * ROW_GROUP_SIZE) * rows_per_image)
        for record in records.values()
        for group in range(-(-record.rows // ROW_GROUP_SIZE))
    ]


def _labels(images: pa.Table) -> np.ndarray:
    labels: np.ndarray = images["label"].fill_null(NO_LABEL).to_numpy()
    return labels


def _same_pairs(counts: np.ndarray) -> float:
    """Share of pairs that are of one group, among all pairs of groups of these sizes."""
    total = counts.sum()
    return float((counts * (counts - 1)).sum() / max(1, total * (total - 1)))
