"""Images in Parquet files: encoded bytes (Hugging Face or plain binary) or raw uint8 arrays."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.errors import UserError
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import (
    INDEX_SCHEMA,
    by_file,
    file_entries,
    file_versions,
    finish_index,
    in_stored_order,
    oversize,
)
from pipeline.sources.locations import readable_name
from pipeline.sources.parquet_columns import (
    ImageColumn,
    Layout,
    find_image_column,
    fits,
    image_values,
    is_square,
    open_parquet,
    read_batches,
    readable,
)
from pipeline.sources.parquet_labels import class_names, find_label_column, label_kind, label_numbers, unusable_labels
from pipeline.storage.files import THREADS, Entry, describe
from pipeline.storage.remote import StoreError

_INDEX_BATCH = 256
_MAX_GROUP = 2 << 30
"""Maximum uncompressed bytes of the images in a row group, which is read as a whole."""
_MEASURED = pa.schema({"label": pa.int64(), "size": pa.int64(), "path": pa.string()})


@dataclass(frozen=True)
class ParquetImages:
    """Rows of Parquet files with one schema; `files` are their absolute paths or URIs.

    A sample id is the image struct's `path` if paths are unique and reading in their order visits each row group once;
    otherwise `<file name>#<row>`, the row in eight digits so that ids sort in file order.

    Attributes:
        by_path: whether `stream` takes paths for sample ids.
    """

    random_access: ClassVar[bool] = False

    location: str
    files: tuple[str, ...]
    image: ImageColumn
    label_column: str | None
    label_kind: str
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    by_path: bool = False

    @classmethod
    def open(
        cls, location: str, files: tuple[str, ...], image_column: str | None = None, label_column: str | None = None
    ) -> "ParquetImages":
        """Find the columns in the first file; UserError if it is unreadable, or lacks them, listing those it has."""
        with open_parquet(files[0]) as file:
            schema = file.schema_arrow
            label_column = find_label_column(files[0], schema, label_column)
            image = find_image_column(files[0], file, image_column)
            kind = label_kind(schema.field(label_column).type) if label_column else ""
            unusable = tuple(unusable_labels(schema, label_column))
            return cls(location, files, image, label_column, kind, class_names(files, schema, label_column), unusable)

    @property
    def name(self) -> str:
        """The last two components of the location, without `.parquet`."""
        return readable_name(self.location)

    def versions(self) -> dict[str, int]:
        """The versions of the files."""
        return file_versions(self.files)

    def only(self, files: Sequence[str]) -> "ParquetImages":
        """The source of some of the files."""
        return replace(self, files=tuple(files))

    def index(self) -> pa.Table:
        """One row per Parquet row; reads the image column once for its byte lengths, without decoding."""
        tables = [self._index_file(path, number) for number, path in enumerate(self.files)]
        table = pa.concat_tables(tables)
        return self._finished(table, _paths_are_ids(table))

    def _finished(self, table: pa.Table, by_path: bool) -> pa.Table:
        if by_path:
            table = table.set_column(table.schema.get_field_index("sample_id"), "sample_id", table["path"])
        looked_for = f"rows in {len(self.files)} Parquet file(s)"
        return finish_index(table, location=self.location, looked_for=looked_for, left_out=self.left_out)

    @property
    def identity(self) -> str:
        """The columns, the names of classes, and the rule of sample ids."""
        image = [self.image.name, self.image.layout]
        return json.dumps([image, self.label_column, self.label_kind, self.classes, self.by_path])

    @property
    def may_have_labels(self) -> bool:
        """Whether there is a column of them."""
        return self.label_column is not None

    def archives(self) -> list[Entry]:
        """The files with sizes and versions."""
        return file_entries(self.files)

    def count(self, archives: Sequence[str]) -> tuple[int, int]:
        """Rows and uncompressed bytes of the image column, by the footers."""
        with ThreadPoolExecutor(THREADS) as pool:
            counts = [*map_ahead(pool, self._count, archives, THREADS)]
        return sum(rows for rows, _ in counts), sum(size for _, size in counts)

    def _count(self, path: str) -> tuple[int, int]:
        with self._open(path) as file:
            sizes = (self._group_bytes(file.metadata, group) for group in range(file.num_row_groups))
            return file.metadata.num_rows, sum(sizes)

    def prepared(self, archives: Sequence[str]) -> "ParquetImages":
        """The source that knows from the paths in all new files whether they can be sample ids."""
        if self.image.layout != "struct":
            return self
        with ThreadPoolExecutor(THREADS) as pool:
            tables = [*map_ahead(pool, partial(self._paths, archives), range(len(archives)), THREADS)]
        return replace(self, by_path=_paths_are_ids(pa.concat_tables(tables)))

    def stream(self, archive: str, take: Callable[[int, bytes | Exception], None]) -> tuple[pa.Table, str]:
        """See :class:`~pipeline.sources.streamed.StreamedSource`; the file is read row group by row group."""
        table = self._index_file(archive, 0, take)
        if table.num_rows:
            table = self._finished(table, self.by_path)
        return table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA).replace_schema_metadata(), ""

    def notes(self, passed_over: Iterable[str]) -> list[str]:
        """The columns that cannot be labels."""
        return [*self.left_out]

    def _open(self, path: str) -> pq.ParquetFile:
        file = open_parquet(path)
        self._refuse_other_schema(path, file.schema_arrow)
        self._refuse_large_groups(path, file.metadata)
        return file

    def _index_file(
        self, path: str, number: int, take: Callable[[int, bytes | Exception], None] | None = None
    ) -> pa.Table:
        with self._open(path) as file:
            version, parts, row = describe(path).version, list[pa.RecordBatch](), 0
            columns = [self.image.name] + ([self.label_column] if self.label_column else [])
            try:
                with readable(path):
                    for batch in read_batches(file, columns, _INDEX_BATCH):
                        parts.append(self._measure(batch))
                        if take is not None:
                            self._hand_over(batch, parts[-1]["size"].to_pylist(), row, take)
                        row += len(batch)
            except ValueError as error:
                problem = f"column '{self.label_column}' {error}"
                raise UserError(f"{path}: {problem}; correct it, or name another column") from error
            groups = _groups(file, number)
        table, name = pa.Table.from_batches(parts, schema=_MEASURED), os.path.basename(path)
        table = table.append_column("sample_id", [[f"{name}#{row:08d}" for row in range(table.num_rows)]])
        table = table.append_column("uri", pa.repeat(path, table.num_rows))
        table = table.append_column("version", pa.repeat(pa.scalar(version, pa.int64()), table.num_rows))
        table = table.append_column("offset", pa.array(np.arange(table.num_rows)))
        return table.append_column("group", groups)

    def _paths(self, archives: Sequence[str], number: int) -> pa.Table:
        """Path and row group of every row of one of these files; reads no image."""
        path = archives[number]
        with self._open(path) as file:
            if file.schema_arrow.field(self.image.name).type.get_field_index("path") < 0:
                paths = pa.nulls(file.metadata.num_rows, pa.string())
            else:
                with readable(path):
                    batches = [*read_batches(file, [f"{self.image.name}.path"])]
                columns = [pc.struct_field(batch.column(0), "path").cast(pa.string()) for batch in batches]
                paths = pa.chunked_array(columns, pa.string())
            return pa.table({"path": paths, "group": _groups(file, number)})

    def _refuse_other_schema(self, path: str, schema: pa.Schema) -> None:
        label = self.label_column
        for name in filter(None, (self.image.name, label)):
            if name not in schema.names:
                raise UserError(f"{path}: has no column '{name}', unlike {self.files[0]}; name files of one schema")
        if not fits(self.image, schema) or (label and label_kind(schema.field(label).type) != self.label_kind):
            raise UserError(f"{path}: the types of its columns differ from {self.files[0]}; name files of one schema")

    def _hand_over(
        self, batch: pa.RecordBatch, sizes: list[int], first: int, take: Callable[[int, bytes | Exception], None]
    ) -> None:
        images = image_values(batch.column(self.image.name), self.image.layout)
        for row, (size, image) in enumerate(zip(sizes, images, strict=True), first):
            take(row, oversize(size) or _image_bytes(image, self.image.layout))

    def _group_bytes(self, metadata: pq.FileMetaData, group: int) -> int:
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == self.image.name)

    def _refuse_large_groups(self, path: str, metadata: pq.FileMetaData) -> None:
        for group in range(metadata.num_row_groups):
            size = self._group_bytes(metadata, group)
            if not 0 <= size <= _MAX_GROUP:
                raise UserError(
                    f"{path}: the images of row group {group} take {size / 2**30:.1f} GiB uncompressed, more than the "
                    f"{_MAX_GROUP >> 30} GiB allowed; rewrite the file with smaller row groups"
                )

    def _measure(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        column, layout = batch.column(self.image.name), self.image.layout
        path = label = pa.nulls(len(batch))
        if layout == "struct" and column.type.get_field_index("path") >= 0:
            path = pc.struct_field(column, "path")
        if self.label_column:
            label = label_numbers(batch.column(self.label_column), self.classes)
        sizes = _byte_counts(image_values(column, layout), layout)
        return pa.record_batch([label.cast(pa.int64()), sizes, path.cast(pa.string())], schema=_MEASURED)

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """Image bytes of these index rows, in any order; raw arrays as PNG. Each row group is read once."""
        yield from in_stored_order(rows, self._read_stored)

    def _read_stored(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        for path, extents in by_file(rows):
            try:
                file = open_parquet(path)
            except StoreError:
                raise
            except UserError as error:
                yield from [error] * len(extents)
                continue
            with file:
                images = self._read_file(file, np.array([offset for offset, _ in extents]))
                for (_, size), image in zip(extents, images, strict=True):
                    yield oversize(size) or image

    def _read_file(self, file: pq.ParquetFile, offsets: np.ndarray) -> Iterator[bytes | Exception]:
        starts = _group_starts(file)
        groups = np.searchsorted(starts, offsets, side="right") - 1
        for run in np.split(np.arange(len(offsets)), np.flatnonzero(np.diff(groups)) + 1):
            group = int(groups[run[0]])
            try:
                column = file.read_row_group(group, columns=[self.image.name]).column(self.image.name)
                values = image_values(column, self.image.layout).take(pa.array(offsets[run] - starts[group]))
            except (pa.ArrowException, OSError, IndexError) as error:
                yield from [error] * len(run)
                continue
            yield from (_image_bytes(value, self.image.layout) for value in values)


def _groups(file: pq.ParquetFile, number: int) -> pa.Array:
    """A number for the row group of every row, which no other file has."""
    groups = np.repeat(np.arange(file.num_row_groups), np.diff(_group_starts(file)))
    return pa.array(groups + number * 2**32)


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    """First row of each row group, then the number of rows: int64 [groups + 1]."""
    metadata = file.metadata
    return np.cumsum([0, *(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))])


def _image_bytes(value: pa.Scalar, layout: Layout) -> bytes | Exception:
    stored = value.value if isinstance(value, pa.DictionaryScalar) else value
    if not stored.is_valid:
        return ValueError("the row has no image bytes")
    try:
        return stored.as_py() if layout in ("struct", "encoded") else _to_png(stored, layout)
    except ValueError as error:
        return error


def _paths_are_ids(table: pa.Table) -> bool:
    path = table["path"]
    if path.null_count or pc.count_distinct(path).as_py() < len(path):
        return False
    # Cache shards follow the order of ids: if paths were shuffled, every shard would read every row group.
    groups = table["group"].take(pc.sort_indices(path)).to_numpy()
    return bool(np.count_nonzero(np.diff(groups)) == len(np.unique(groups)) - 1)


def _byte_counts(column: pa.Array, layout: Layout) -> pa.Array:
    """Bytes of each image as int64, without decoding: the encoded length, 3 n² for arrays, 0 for null."""
    kind = column.type
    if pa.types.is_dictionary(kind):  # its values may repeat, and are not decoded
        return pc.fill_null(_byte_counts(column.dictionary, layout).take(column.indices), 0)
    if pa.types.is_fixed_size_binary(kind):
        counts = pc.if_else(column.is_valid(), kind.byte_width, 0)
    elif layout in ("struct", "encoded") or not pa.types.is_nested(kind):
        counts = pc.binary_length(column)
    else:
        counts = pc.list_value_length(column).cast(pa.int64())
        counts = pc.multiply(3, pc.multiply(counts, counts)) if layout == "nested" else counts
    return pc.fill_null(counts.cast(pa.int64()), 0)


def _to_png(value: pa.Scalar, layout: Layout) -> bytes:
    """A stored array as PNG; ValueError if it is not square with three channels, or a value is not in 0..255."""
    pixels = _nested_pixels(value) if layout == "nested" else _plane_pixels(value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _plane_pixels(value: pa.Scalar) -> np.ndarray:
    flat = value.values.to_numpy() if pa.types.is_nested(value.type) else np.frombuffer(value.as_buffer(), np.uint8)
    if not is_square(len(flat)):
        raise ValueError(f"{len(flat)} values do not make three square planes")
    side = math.isqrt(len(flat) // 3)
    return np.ascontiguousarray(flat.reshape(3, side, side).transpose(1, 2, 0))


def _nested_pixels(value: pa.Scalar) -> np.ndarray:
    rows = value.values
    columns = rows.flatten()
    side = len(rows)
    widths, channels = (pc.unique(pc.list_value_length(part)).to_pylist() for part in (rows, columns))
    if side == 0 or widths != [side] or channels != [3]:
        raise ValueError(f"nested lists of lengths {side}, {widths}, {channels} are not n x n x 3")
    return columns.flatten().cast(pa.uint8()).to_numpy().reshape(side, side, 3)
