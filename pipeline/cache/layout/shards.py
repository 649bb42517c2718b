"""A folder of committed Parquet shards: a shard that is listed is complete.

    shard-00042-3fa9c1d2.parquet   the rows; the name carries the first digits of the file's SHA-256
    shard-00042-3fa9c1d2.npz       statistics of the shard, where there are any
    shard-00042.json               the record that lists it, written last: rows, bytes, SHA-256, timings
    projection-5be01a77.npz        what the rows are projected on, where their codec projects them

The record is one file a shard, not a line in a shared log: object stores cannot append, and two writers of one shard
replace one whole record by another that names its own file, so that neither harms the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.stats import Moments, dump_moments, load_moments
from pipeline.runtime.prefetch import map_ahead
from pipeline.storage.store import Store, report_damage

ROW_GROUP_SIZE = 64
"""Rows of a row group: what a training worker reads at once, and what is shuffled as a unit."""

RECORD = re.compile(r"shard-(\d{5,})\.json")
"""Name of a record."""

_FILE = re.compile(r"(shard-\d{5,}-[0-9a-f]{8}\.(parquet|npz)|projection-[0-9a-f]{8}\.npz)?")

log = logging.getLogger(__name__)


def record_name(shard: int) -> str:
    """Name of the record that lists a shard."""
    return f"shard-{shard:05d}.json"


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one committed shard.

    Attributes:
        shard: its number in the dataset.
        file: name of the Parquet file.
        rows, bytes, sha256: of that file.
        moments: name of the statistics file, or "".
        projection: name of the projection that the rows were encoded with, or "".
        facts: timings in seconds, quarantined samples, fidelity, library versions; of crops and features, the files that
            they were made of.
    """

    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str
    moments: str = ""
    projection: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFolder:
    """The shards of the images, of a view's rows, or of one teacher. Picklable."""

    store: Store
    row_group_size: int = ROW_GROUP_SIZE

    def commit(
        self,
        shard: int,
        table: pa.Table,
        moments: dict[str, Moments] | None = None,
        facts: dict[str, Any] | None = None,
        projection: str = "",
        compression: str = "none",
        before_listing: Callable[[ShardRecord], None] = lambda _: None,
    ) -> ShardRecord:
        """Write a shard, its statistics, and then the record that lists it.

        Args:
            projection: name of the projection that its rows were encoded with.
            compression: of Parquet. Features and JPEGs hardly compress: without it a read is a copy.
            before_listing: called with the record when the files are there and it is not.

        Raises:
            UserError: where the destination refuses the write; nothing is listed then.
        """
        data = _parquet_bytes(table, self.row_group_size, compression)
        sha256 = hashlib.sha256(data).hexdigest()
        stem = f"shard-{shard:05d}-{sha256[:8]}"
        self.store.put(f"{stem}.parquet", data)
        if moments:
            self.store.put(f"{stem}.npz", dump_moments(moments))
        statistics = f"{stem}.npz" if moments else ""
        record = ShardRecord(
            shard, f"{stem}.parquet", table.num_rows, data.size, sha256, statistics, projection, facts or {}
        )
        before_listing(record)
        self.store.put(record_name(shard), json.dumps(asdict(record), sort_keys=True).encode())
        return record

    def records(self) -> dict[int, ShardRecord]:
        """Records of the complete shards by number, in order.

        A shard whose file is gone, has another size than recorded, or was encoded with another projection than the
        folder's is not listed, so that it is computed again.
        """
        files = self.store.files()
        projection = _projection(files)
        complete = {}
        for record in self.listed().values():
            if reason := _fault(record, files.get(record.file), projection):
                log.warning("%s/%s %s: it will be computed again", self.store.uri, record.file, reason)
            else:
                complete[record.shard] = record
        return complete

    def listed(self) -> dict[int, ShardRecord]:
        """Every record by the shard's number, in order, whether or not its file is there; unreadable ones are left out."""
        numbers = [int(match[1]) for name in self.store.files() if (match := RECORD.fullmatch(name))]
        with ThreadPoolExecutor(16) as pool:
            return {record.shard: record for record in pool.map(self.listing, sorted(numbers)) if record is not None}

    def listing(self, shard: int) -> ShardRecord | None:
        """The record of one shard, whether or not its file is there; None where there is none, or none that can be read."""
        try:
            return self.read_record(shard)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("%s/%s %s: the shard will be computed again", self.store.uri, record_name(shard), error)
            return None

    def read_record(self, shard: int) -> ShardRecord:
        """What lists a shard, whether or not its file is there.

        Raises:
            FileNotFoundError: where nothing does.
            ValueError: where that is not a record of this shard.
        """
        data = self.store.get(record_name(shard))
        try:
            record = ShardRecord(**json.loads(data))
            _check_fields(record)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"is not a record ({error})") from error
        if record.shard != shard:
            raise ValueError(f"is the record of shard {record.shard}")
        return record

    def unlist(self, shard: int) -> None:
        """Take a shard out of the folder: first what lists it, then its files; those of another shard are left."""
        record = self.listing(shard)
        self.store.delete(record_name(shard))
        for name in (record.file, record.moments) if record else ():
            if name.startswith(f"shard-{shard:05d}-"):
                self.store.delete(name)

    def record(self, shard: int) -> ShardRecord | None:
        """The record of one shard, or None where it is not complete."""
        record = self.listing(shard)
        if record is None:
            return None
        projection = self.projection if record.projection else ""
        return None if _fault(record, self.store.size(record.file), projection) else record

    @property
    def projection(self) -> str:
        """Name of the folder's projection, or "" while there is none."""
        return _projection(self.store.files())

    def add_projection(self, data: bytes) -> None:
        """Write a projection under the name of its content.

        Where two writers fitted one each, every reader takes the same one of them, see `projection`.
        """
        self.store.put(f"projection-{hashlib.sha256(data).hexdigest()[:8]}.npz", data)

    def read(self, record: ShardRecord, columns: list[str] | None = None) -> pa.Table:
        """All rows of a shard.

        Raises:
            UserError: where the file is gone or damaged.
        """
        with report_damage(f"{self.store.uri}/{record.file}"):
            file = self.store.open(record.file)
            return selected(pq.read_table(file, columns=columns, page_checksum_verification=True), columns)

    def read_group(self, record: ShardRecord, group: int, columns: list[str] | None = None) -> pa.Table:
        """One row group of a shard; raises as `read` does."""
        with (
            report_damage(f"{self.store.uri}/{record.file}"),
            pq.ParquetFile(self.store.open(record.file), page_checksum_verification=True) as file,
        ):
            return selected(file.read_row_group(group, columns=columns, use_threads=False), columns)

    def moments(self, records: Iterable[ShardRecord]) -> Iterator[dict[str, Moments]]:
        """Statistics of these shards, in their order, read a few ahead."""
        with ThreadPoolExecutor(4) as pool:
            yield from map_ahead(pool, self._moments, (record.moments for record in records), ahead=4)

    def _moments(self, name: str) -> dict[str, Moments]:
        with report_damage(f"{self.store.uri}/{name}"):
            return load_moments(self.store.get(name))


def _check_fields(record: ShardRecord) -> None:
    """Refuse what JSON can hold and a record cannot, above all the name of a file that lies elsewhere."""
    counts, names = (record.shard, record.rows, record.bytes), (record.file, record.moments, record.projection)
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not isinstance(record.facts, dict):
        raise ValueError("a field is of another type")
    if not record.file or not all(_FILE.fullmatch(name) for name in names):
        raise ValueError("it names what is no file of a shard")


def keys_of(table: pa.Table) -> list[tuple[str, int]]:
    """Sample id and view of every row."""
    return list(zip(table["sample_id"].to_pylist(), table["view"].to_pylist(), strict=True))


def in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    """A column without chunks; `combine_chunks` would copy one that is in one piece already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """A ``fixed_size_binary`` column as [N, width] uint8, read-only and without a copy."""
    array = in_one_piece(column)
    width = array.type.byte_width
    if not len(array):
        return np.empty((0, width), np.uint8)
    rows = np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, width)
    return rows[array.offset : array.offset + len(array)]


def selected(table: pa.Table, columns: list[str] | None) -> pa.Table:
    """These columns, of which Parquet leaves out in silence what a file lacks; KeyError where it does."""
    return table if columns is None else table.select(columns)


def _projection(files: Iterable[str]) -> str:
    return min((name for name in files if name.startswith("projection-")), default="")


def _fault(record: ShardRecord, size: int | None, projection: str) -> str:
    """Why a recorded shard does not count, or ""."""
    if size is None:
        return "is missing"
    if size != record.bytes:
        return f"has {size} bytes, its record says {record.bytes}"
    return "was encoded with another projection" if record.projection != projection else ""


def _parquet_bytes(table: pa.Table, row_group_size: int, compression: str) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_size,
        compression=compression,
        use_dictionary=False,
        write_statistics=["sample_id"],
        write_page_checksum=True,
    )
    return sink.getvalue()
