"""What can be told of the cache's files without a teacher: hashes, types, counts, keys, values, statistics.

Every check raises :class:`BrokenError`, which names the file and what is wrong with it. Imports neither Ray nor MLflow.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection, load_projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.keys import index_fingerprint
from pipeline.cache.layout.phi_s import PhiS, load_phi_s
from pipeline.cache.layout.shards import ShardFolder, ShardRecord, fixed_width, keys_of, record_name
from pipeline.cache.layout.stats import Moments, load_moments, merge_all
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA, ROWS_SCHEMA, views_of
from pipeline.errors import one_line
from pipeline.storage.store import Store

TOLERANCE = {"float32": 0.05, "bfloat16": 0.15}
"""Relative error that another device may put between two computations of the same features, by `cache.precision`.

A rounding costs 5e-4 (TF32, which cuDNN uses for float32) or 4e-3 (bfloat16), and a deep network adds up dozens. What is
wrong differs by far more: unrelated vectors by 1.4 (sqrt 2), features of another image by 0.3 and more.
"""

T = TypeVar("T")


class BrokenError(Exception):
    """A file of the cache is not what it should be.

    Attributes:
        file: its name in its folder.
        problem: what is wrong, in words that follow the name.
    """

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the cache.

    Attributes:
        dataset: its id.
        part: ``index``, ``images``, ``rows``, or a teacher's id.
        shard: its number, or None for a file that belongs to all shards.
        file: path below the cache.
        problem: what is wrong with it.
    """

    dataset: str
    part: str
    shard: int | None
    file: str
    problem: str


def finding(dataset: Dataset, part: str, folder: Store, shard: int | None, broken: BrokenError) -> Finding:
    """What was found in a folder of a dataset."""
    cache = dataset.store.uri.rpartition("/")[0]
    path = f"{folder.uri.removeprefix(f'{cache}/')}/{broken.file}"
    return Finding(dataset.id, part, shard, path, broken.problem)


@dataclass(frozen=True)
class Shard:
    """A committed shard whose bytes are those that its record names."""

    record: ShardRecord
    file: pq.ParquetFile

    def read(self) -> pa.Table:
        """All its rows."""
        return self._checked(self.file.read)

    def groups(self) -> Iterator[pa.Table]:
        """Its row groups in order."""
        for group in range(self.file.num_row_groups):
            yield self.read_group(group)

    def read_group(self, group: int) -> pa.Table:
        """One row group."""
        return self._checked(lambda: self.file.read_row_group(group))

    def read_keys(self) -> list[tuple[str, int]]:
        """(sample id, view) of every row."""
        return keys_of(self._checked(lambda: self.file.read(["sample_id", "view"])))

    def _checked(self, read: Callable[[], pa.Table]) -> pa.Table:
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise self.broken(f"cannot be read as Parquet: {one_line(error)}") from error

    def fact(self, *path: str) -> Any:
        """What its record tells under this path of keys."""
        value: Any = self.record.facts
        for key in path:
            if not isinstance(value, dict) or key not in value:
                raise BrokenError(record_name(self.record.shard), f"does not tell {'.'.join(path)}")
            value = value[key]
        return value

    def broken(self, problem: str) -> BrokenError:
        """What is wrong with its Parquet file."""
        return BrokenError(self.record.file, problem)


def open_shard(folder: ShardFolder, shard: int) -> Shard:
    """Read the bytes of a shard and compare them with its record."""
    try:
        record = folder.read_record(shard)
    except FileNotFoundError:
        raise BrokenError(record_name(shard), "is missing: the shard is not there") from None
    except ValueError as error:
        raise BrokenError(record_name(shard), str(error)) from error
    data = _get(folder.store, record.file)
    if len(data) != record.bytes:
        raise BrokenError(record.file, f"has {len(data)} bytes, its record says {record.bytes}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != record.sha256:
        raise BrokenError(record.file, f"has SHA-256 {sha256[:12]}, its record says {record.sha256[:12]}")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise BrokenError(record.file, f"is no Parquet file: {one_line(error)}") from error
    opened = Shard(record, file)
    _check_layout(opened, folder.row_group_size)
    return opened


def _get(store: Store, name: str) -> bytes:
    try:
        return store.get(name)
    except FileNotFoundError:
        raise BrokenError(name, "is missing") from None


def _check_layout(shard: Shard, group_size: int) -> None:
    metadata, rows = shard.file.metadata, shard.record.rows
    if metadata.num_rows != rows:
        raise shard.broken(f"has {metadata.num_rows} rows, its record says {rows}")
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    due = [min(group_size, rows - first) for first in range(0, rows, group_size)]
    if [size for size in groups if size] != due:
        raise shard.broken(f"has row groups of {groups} rows, not of {group_size}")


def check_images(opened: Shard, index: pa.Table | None) -> pa.Table:
    """The images of a shard: those of its part of the index in that order, less the quarantined ones."""
    _check_schema(opened, IMAGES_SCHEMA)
    images = opened.read()
    if index is not None:
        bad = {sample["sample_id"] for sample in opened.fact("bad")}
        due = index.filter(pa.array([name not in bad for name in index["sample_id"].to_pylist()], pa.bool_()))
        _check_keys(opened, due["sample_id"].to_pylist(), images["sample_id"].to_pylist())
        _check_keys(opened, due["label"].to_pylist(), images["label"].to_pylist(), "label")
    _check_geometry(opened, images)
    return images


def check_rows_shard(dataset: Dataset, opened: Shard, images: pa.Table | None) -> pa.Table:
    """The crops of a shard: every view of every image, in order."""
    _check_schema(opened, ROWS_SCHEMA)
    rows = opened.read()
    if images is not None:
        views = range(dataset.policy.rows_per_image)
        due = [(name, view) for name in images["sample_id"].to_pylist() for view in views]
        _check_keys(opened, due, keys_of(rows))
    _check_geometry(opened, rows)
    return rows


def check_derived_from(opened: Shard, files: Mapping[str, str]) -> None:
    """A derived shard names these files as its sources, if it names any: records of older versions do not."""
    for part, file in files.items():
        source = opened.record.facts.get(part, file)
        if source != file:
            raise opened.broken(f"was derived from other {part} ({source}) than the present ones")


def _check_geometry(opened: Shard, rows: pa.Table) -> None:
    try:
        views_of(rows)
    except (ValueError, TypeError) as error:
        raise opened.broken(str(error)) from error


def check_features(teacher: CachedTeacher, opened: Shard, rows: pa.Table | None) -> None:
    """Types and keys of a teacher's shard; the values are a matter of `check_values`."""
    codecs = teacher.codecs(None)
    if not Codec.parse(teacher.codec).pca:
        widths = {kind: codec.row_bytes for kind, codec in codecs.items()}
        _check_schema(opened, features_schema(widths))
    metadata = opened.file.schema_arrow.metadata or {}
    due = {b"teacher": teacher.id, b"codec": teacher.codec, b"projection": opened.record.projection}
    for name, value in due.items():
        found = metadata.get(name, b"").decode()
        if found != value:
            raise opened.broken(f"says {name.decode()} {found or 'nothing'}, {value or 'none'} is due")
    for kind, shape in teacher.shapes.items():
        if metadata.get(f"{kind}.shape".encode()) != json.dumps(shape).encode():
            raise opened.broken(f"does not say that {kind} are of shape {shape}")
    if rows is not None:
        _check_keys(opened, keys_of(rows), opened.read_keys())


def features_schema(widths: dict[str, int]) -> pa.Schema:
    """Columns of a teacher's shard, given the bytes of a row by token type."""
    keys = [ROWS_SCHEMA.field("sample_id"), ROWS_SCHEMA.field("view")]
    return pa.schema([*keys, *(pa.field(kind, pa.binary(width), nullable=False) for kind, width in widths.items())])


def check_values(folder: ShardFolder, teacher: CachedTeacher, opened: Shard, codecs: dict[str, FeatureCodec]) -> None:
    """Every stored value is finite, and all together have the statistics that were taken before they were encoded."""
    _check_schema(opened, features_schema({kind: codec.row_bytes for kind, codec in codecs.items()}))
    moments = check_moments(folder, opened.record, teacher)
    sums = {kind: _Sums(codec.shape[-1]) for kind, codec in codecs.items()}
    for table in opened.groups():
        for kind, codec in codecs.items():
            values = decode(table[kind], codec)
            finite = torch.isfinite(values).flatten(1).all(dim=1)
            if not finite.all():
                row = int((~finite).nonzero()[0])
                raise opened.broken(f"holds {kind} that are not finite, first of {table['sample_id'][row]}")
            sums[kind].add(values)
    for kind, total in sums.items():
        if total.count:
            loss = opened.fact("fidelity", kind, "relative_error")
            total.check(opened, kind, moments[kind], 2 * loss + TOLERANCE[teacher.precision])


def decode(column: pa.ChunkedArray, codec: FeatureCodec) -> Tensor:
    """A column of stored rows as features [N, *shape] float32."""
    return codec.decode(torch.from_numpy(fixed_width(column).copy()))


class _Sums:
    """Mean and mean square of stored values, beside the moments of the features that they were made of.

    The root mean square of a difference bounds that of its means, and the difference of the root mean squares. The
    fidelity that a record tells is that of the shard's first batch, hence twice that loss is allowed to its mean.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(channels, dtype=torch.float64), 0.0

    def add(self, values: Tensor) -> None:
        flat = values.reshape(-1, len(self.sum)).double()
        self.count += len(flat)
        self.sum += flat.sum(dim=0)
        self.square += float(flat.square().sum())

    def check(self, opened: Shard, kind: str, moments: Moments, bound: float) -> None:
        if moments.count != self.count:
            raise BrokenError(opened.record.moments, f"counts {moments.count} {kind}, the shard holds {self.count}")
        size = float(np.sqrt(np.trace(moments.scatter) / moments.count + np.sum(moments.mean**2)))
        drift = float(np.linalg.norm((self.sum / self.count).numpy() - moments.mean))
        drift = max(drift, abs(float(np.sqrt(self.square / self.count)) - size))
        if drift > bound * size:
            share = f"{drift / size:.3f}, the codec allows {bound:.3f}"
            raise opened.broken(f"holds {kind} unlike their statistics ({share})")


def check_moments(folder: ShardFolder, record: ShardRecord, teacher: CachedTeacher) -> dict[str, Moments]:
    """The statistics of a teacher's shard."""
    if not record.rows:
        return {}
    if not record.moments:
        raise BrokenError(record_name(record.shard), "names no statistics")
    moments = _load(folder.store, record.moments, load_moments)
    if {kind: part.mean.shape for kind, part in moments.items()} != {k: s[-1:] for k, s in teacher.shapes.items()}:
        raise BrokenError(record.moments, f"does not hold the statistics of {' and '.join(teacher.shapes)}")
    if not all(np.isfinite(part.mean).all() and np.isfinite(part.scatter).all() for part in moments.values()):
        raise BrokenError(record.moments, "holds statistics that are not finite")
    return moments


def _load(store: Store, name: str, load: Callable[[bytes], T]) -> T:
    """What an .npz file holds, whose checksums find changed bytes."""
    data = _get(store, name)
    try:
        return load(data)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BrokenError(name, f"cannot be read: {error}") from error


def check_index(dataset: Dataset) -> None:
    """The index is the one whose fingerprint names the dataset."""
    name = "index.parquet"
    try:
        index = pq.ParquetFile(pa.BufferReader(_get(dataset.store, name)))
        fingerprint, groups = index_fingerprint(index.read()), index.num_row_groups
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BrokenError(name, f"is no Parquet file: {one_line(error)}") from error
    if fingerprint != dataset.fingerprint:
        raise BrokenError(name, f"has fingerprint {fingerprint[:12]}, the dataset is {dataset.fingerprint[:12]}")
    if groups != dataset.shards:
        raise BrokenError(name, f"has {groups} row groups, the dataset has {dataset.shards} shards")


def check_description(folder: ShardFolder, teacher: CachedTeacher) -> str:
    """The SHA-256 of the weights that a teacher's folder was made with."""
    name = "teacher.json"
    data = _get(folder.store, name)
    try:
        described = json.loads(data)
        described_id, weights = described["id"], described["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenError(name, f"cannot be read: {error}") from error
    if described_id != teacher.id:
        raise BrokenError(name, f"describes {described_id}")
    return str(weights)


def check_projection(folder: ShardFolder, teacher: CachedTeacher) -> Projection | None:
    """What the patches of a teacher's folder are projected on; None where they are stored as they are."""
    if not Codec.parse(teacher.codec).pca:
        return None
    name = folder.projection
    if not name:
        named = {record.projection for record in folder.listed().values()}
        raise BrokenError(min(named, default="projection"), "is missing: the shards cannot be decoded without it")
    if hashlib.sha256(_get(folder.store, name)).hexdigest()[:8] != name.removeprefix("projection-")[:8]:
        raise BrokenError(name, "does not hold the bytes that its name says")
    projection = _load(folder.store, name, load_projection)
    channels = teacher.patches_shape[-1]
    if projection and (projection.basis.shape[1:] != (channels,) or not torch.isfinite(projection.basis).all()):
        raise BrokenError(name, f"is no projection of {channels} channels")
    return projection


def check_statistics(folder: ShardFolder, teacher: CachedTeacher) -> None:
    """The frozen statistics are those of all shards together, and PHI-S levels them.

    Shards that were computed again, on another device, may have moved them by `TOLERANCE`.
    """
    records = [record for record in folder.listed().values() if record.rows]
    frozen = _load(folder.store, "stats.npz", load_moments)
    rotations = _load(folder.store, "phi_s.npz", load_phi_s)
    due = merge_all(check_moments(folder, record, teacher) for record in records)
    for kind in teacher.shapes:
        if kind not in frozen or not _alike(frozen[kind], due[kind], TOLERANCE[teacher.precision]):
            raise BrokenError("stats.npz", f"does not hold the statistics of the shards' {kind}")
        if kind not in rotations or not _levels(rotations[kind], frozen[kind]):
            raise BrokenError("phi_s.npz", f"does not level the variances of stats.npz over the {kind}")


def _alike(frozen: Moments, due: Moments, tolerance: float) -> bool:
    size = np.sqrt(np.trace(due.scatter) / due.count + np.sum(due.mean**2))
    mean = np.linalg.norm(frozen.mean - due.mean) <= tolerance * size
    scatter = np.linalg.norm(frozen.scatter - due.scatter) <= tolerance * np.linalg.norm(due.scatter)
    return bool(frozen.count == due.count and mean and scatter)


def _levels(phi: PhiS, moments: Moments) -> bool:
    variances = np.diagonal(phi.rotation @ moments.covariance @ phi.rotation.T)
    return bool(np.allclose(phi.mean, moments.mean) and np.allclose(variances, phi.scale**2, rtol=1e-2))


def _check_schema(opened: Shard, due: pa.Schema) -> None:
    found = opened.file.schema_arrow.remove_metadata()
    if not found.equals(due):
        unlike = next((field for field in due if field not in found), due)
        raise opened.broken(f"has columns {', '.join(f'{f.name} {f.type}' for f in found)}; due is {unlike}")


def _check_keys(opened: Shard, due: list[T], found: list[T], what: str = "key") -> None:
    if len(due) != len(found):
        raise opened.broken(f"has {len(found)} rows, {len(due)} are due")
    for row, (wanted, given) in enumerate(zip(due, found, strict=True)):
        if wanted != given:
            raise opened.broken(f"has {what} {given} in row {row}, where {wanted} is due")
