"""Checks of the cache's files that need no teacher: hashes, types, counts and keys.

Every check raises :class:`BrokenError`, which names the file and the problem. Imports neither Ray nor MLflow.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection
from pipeline.cache.layout.keys import FORMAT_VERSION, fingerprint, unsealed
from pipeline.cache.layout.part import PART_SCHEMA, Part, image_key, part_id, teacher_home
from pipeline.cache.layout.part_stats import STATISTICS, load_part_stats
from pipeline.cache.layout.projection import load_projections
from pipeline.cache.layout.shards import RECORDS, ShardFolder, ShardRecord, keys_of, projection_in, record_name
from pipeline.cache.layout.shares import with_features
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA, ROWS_SCHEMA, rows_schema, views_of
from pipeline.errors import one_line
from pipeline.storage.store import Store

T = TypeVar("T")


class BrokenError(Exception):
    """A file of the cache is not what it should be; `problem` is a phrase that follows the file's name."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


@dataclass(frozen=True)
class Finding:
    """A problem found in the cache.

    Attributes:
        place: id of a part or of a teacher, or the name of a data set.
        what: ``index``, ``images``, ``rows``, ``samples``, ``version``, ``source``, or a teacher's id.
        shard: its number, or None for a file that belongs to all shards.
        file: path below the cache.
    """

    place: str
    what: str
    shard: int | None
    file: str
    problem: str


def finding(cache: Store, place: str, what: str, folder: Store, shard: int | None, broken: BrokenError) -> Finding:
    """The finding for a broken file in a folder of the cache."""
    path = f"{folder.uri.removeprefix(f'{cache.uri}/')}/{broken.file}"
    return Finding(place, what, shard, path, broken.problem)


@dataclass(frozen=True)
class Shard:
    """A committed shard whose bytes match its record."""

    record: ShardRecord
    file: pq.ParquetFile

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All its rows, or these columns of them."""
        return self._checked(lambda: self.file.read(columns))

    def read_group(self, group: int) -> pa.Table:
        """One row group."""
        return self._checked(lambda: self.file.read_row_group(group))

    def _checked(self, read: Callable[[], pa.Table]) -> pa.Table:
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise self.broken(f"cannot be read as Parquet: {one_line(error)}") from error

    def fact(self, *path: str) -> Any:
        """The value under this path of keys in its record."""
        value: Any = self.record.facts
        for key in path:
            if not isinstance(value, dict) or key not in value:
                raise BrokenError(record_name(self.record.shard), f"lacks {'.'.join(path)}")
            value = value[key]
        return value

    def broken(self, problem: str) -> BrokenError:
        """The error for its Parquet file."""
        return BrokenError(self.record.file, problem)


def open_shard(folder: ShardFolder, shard: int) -> Shard:
    """Read the bytes of a shard and compare them with its record."""
    try:
        record = folder.read_record(shard)
    except FileNotFoundError:
        raise BrokenError(record_name(shard), "is missing, and with it the shard") from None
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
    metadata, rows, size = file.metadata, record.rows, folder.row_group_size
    if metadata.num_rows != rows:
        raise BrokenError(record.file, f"has {metadata.num_rows} rows, its record says {rows}")
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if [count for count in groups if count] != [min(size, rows - first) for first in range(0, rows, size)]:
        raise BrokenError(record.file, f"has row groups of {groups} rows, not of {size}")
    return Shard(record, file)


def _get(store: Store, name: str) -> bytes:
    try:
        return store.get(name)
    except FileNotFoundError:
        raise BrokenError(name, "is missing") from None


def check_images(opened: Shard, keys: list[bytes] | None) -> pa.Table:
    """Check and return a shard's images: those with these keys, in order, and each with the bytes that its key says."""
    check_schema(opened, IMAGES_SCHEMA)
    images = opened.read()
    stored = images["key"].to_pylist()
    if keys is not None:
        _check_keys(opened, [key.hex() for key in keys], [key.hex() for key in stored])
    for key, data in zip(stored, images["image"], strict=True):
        if image_key(data.as_py()) != key:
            raise opened.broken(f"holds other bytes than the key {key.hex()} says")
    _check_geometry(opened, images)
    return images


def check_rows_shard(part: Part, opened: Shard, images: pa.Table | None) -> pa.Table:
    """Check and return the crops of a shard: every view of every image, in order."""
    check_schema(opened, rows_schema(part.policy))
    rows = opened.read()
    if images is not None:
        views = range(part.policy.rows_per_image)
        due = [(key.hex(), view) for key in images["key"].to_pylist() for view in views]
        _check_keys(opened, due, keys_of(rows))
    _check_geometry(opened, rows)
    return rows


def check_derived_from(opened: Shard, files: Mapping[str, str]) -> None:
    """Check that a derived shard names these files as its sources, if it names any: older versions did not."""
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
    """Check the types and keys of a teacher's shard; `check_values` checks the values."""
    if not Codec.parse(teacher.codec).pca:
        check_schema(opened, features_schema(teacher, teacher.codecs()))
    metadata = opened.file.schema_arrow.metadata or {}
    due = {b"teacher": teacher.id, b"codec": teacher.codec, b"projection": opened.record.projection}
    for name, value in due.items():
        found = metadata.get(name, b"").decode()
        if found != value:
            raise opened.broken(f"has {name.decode()} {found or 'none'} in its metadata instead of {value or 'none'}")
    for kind, shape in teacher.shapes.items():
        if metadata.get(f"{kind}.shape".encode()) != json.dumps(shape).encode():
            raise opened.broken(f"does not have the shape {shape} of {kind} in its metadata")
    if rows is not None:
        _check_keys(opened, keys_of(rows), keys_of(opened.read(["key", "view"])))
    for kind in teacher.shapes if teacher.share < 1 else ():
        table = opened.read(["key", kind])
        wrong = np.flatnonzero(with_features(table[kind]) != teacher.asked(table["key"]))
        if len(wrong):
            row = table["key"][int(wrong[0])].as_py().hex()
            raise opened.broken(f"has {kind} of other images than those of its share, first in the row of {row}")


def features_schema(teacher: CachedTeacher, codecs: Mapping[str, FeatureCodec]) -> pa.Schema:
    """Columns of a teacher's shard."""
    keys = [ROWS_SCHEMA.field("key"), ROWS_SCHEMA.field("view")]
    null = teacher.share < 1
    columns = [pa.field(kind, pa.binary(codec.row_bytes), nullable=null) for kind, codec in codecs.items()]
    return pa.schema([*keys, *columns])


def load_file(store: Store, name: str, load: Callable[[bytes], T]) -> T:
    """The content of an .npz file, whose checksums reveal changed bytes."""
    data = _get(store, name)
    try:
        return load(data)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BrokenError(name, f"cannot be read: {error}") from error


def check_index(part: Part) -> pa.Table:
    """Check and return the index of a part, whose keys give the part its name."""
    name = "index.parquet"
    try:
        data = pa.BufferReader(_get(part.store, name))
        index = pq.read_table(data, schema=PART_SCHEMA, page_checksum_verification=True)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise BrokenError(name, f"is no Parquet file of keys and sizes: {one_line(error)}") from error
    if part_id(index) != part.id:
        raise BrokenError(name, f"has keys of the part {part_id(index)}")
    if index.num_rows != part.count:
        raise BrokenError(name, f"has {index.num_rows} rows, the part has {part.count} images")
    return index


def check_part(part: Part) -> None:
    """Check the description of a part."""
    due = {"format": FORMAT_VERSION, "count": part.count, "shard_size": part.shard_size}
    if _description(part.store, "part.json") != due:
        raise BrokenError("part.json", f"does not say {due}")


def check_records(folder: ShardFolder) -> None:
    """Check that the records that were written together, if they were, are those of the shards."""
    if not folder.store.exists(RECORDS):
        return
    listed = folder.listed()
    for item in _description(folder.store, RECORDS).get("records", []):
        if item["shard"] in listed and asdict(listed[item["shard"]]) != item:
            raise BrokenError(RECORDS, f"has another record of shard {item['shard']} than the shard itself")


def check_part_stats(folder: ShardFolder, records: Mapping[int, ShardRecord]) -> None:
    """Check that the statistics of every complete shard of a teacher are there: its own, or those of all together."""
    names = folder.store.files()
    kept = load_file(folder.store, STATISTICS, load_part_stats).shards if STATISTICS in names else {}
    lacks = "lacks" if STATISTICS in names else "is missing, and with it"
    for record in records.values():
        if record.moments and record.moments not in names and record.file not in kept:
            raise BrokenError(STATISTICS, f"{lacks} the statistics of {record.file}")


def check_samples(store: Store, name: str) -> None:
    """Check that a file of samples has the content that its name says."""
    try:
        samples = pq.read_table(pa.BufferReader(_get(store, name)))
        found = fingerprint(samples)[:16]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BrokenError(name, f"is no Parquet file: {one_line(error)}") from error
    if not name.endswith(f"-{found}.parquet"):
        raise BrokenError(name, "does not have the content that its name says")


def check_description(cache: Store, teacher: CachedTeacher) -> str:
    """Check teacher.json; returns the SHA-256 of the weights that the features were made with."""
    name = "teacher.json"
    described = _description(teacher_home(cache, teacher.id), name)
    described_id, weights = described.get("id"), described.get("weights_sha256")
    if described_id != teacher.id:
        raise BrokenError(name, f"describes {described_id}")
    return str(weights)


def _description(store: Store, name: str) -> dict[str, Any]:
    data = _get(store, name)
    try:
        return unsealed(data)
    except ValueError as error:
        raise BrokenError(name, f"cannot be read: {error}") from error


def check_projections(cache: Store, teacher: CachedTeacher) -> dict[str, Projection] | None:
    """Check and return the projections of a teacher's features by token type; None if they are stored as they are."""
    if not Codec.parse(teacher.codec).pca:
        return None
    home = teacher_home(cache, teacher.id)
    name = projection_in(home)
    if not name:
        raise BrokenError("projection", "is missing: the shards cannot be decoded without it")
    if hashlib.sha256(_get(home, name)).hexdigest()[:8] != name.removeprefix("projection-")[:8]:
        raise BrokenError(name, "does not have the content that its name says")
    projections = load_file(home, name, load_projections)
    for kind, part in projections.items():
        channels = teacher.shapes[kind][-1] if kind in teacher.shapes else 0
        tensors = [part.mean, part.scale, *([] if part.components is None else part.components)]
        if not all(tensor.shape == (channels,) and torch.isfinite(tensor).all() for tensor in tensors):
            raise BrokenError(name, f"is no projection of {kind} with {channels} channels")
    return projections


def check_schema(opened: Shard, due: pa.Schema) -> None:
    """Check the columns of a shard and their types."""
    found = opened.file.schema_arrow.remove_metadata()
    if not found.equals(due):
        unlike = next((field for field in due if field not in found), due)
        raise opened.broken(f"has columns {', '.join(f'{f.name} {f.type}' for f in found)}; expected {unlike}")


def _check_keys(opened: Shard, due: list[T], found: list[T], what: str = "key") -> None:
    if len(due) != len(found):
        raise opened.broken(f"has {len(found)} rows instead of {len(due)}")
    for row, (wanted, given) in enumerate(zip(due, found, strict=True)):
        if wanted != given:
            raise opened.broken(f"has {what} {given} in row {row} instead of {wanted}")
