"""A folder of committed Parquet shards (docs/cache.md): a shard is complete once its record, written last, lists it.

Each shard has a record file of its own because object stores cannot append to a shared log. If two processes write the
same shard, the later record replaces the earlier one and names its own data file, so neither harms the other.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.keys import sealed, unsealed
from pipeline.cache.layout.part_stats import STATISTICS, PartStats, dump_part_stats, load_part_stats
from pipeline.cache.layout.stats import Moments, dump_moments, load_moments
from pipeline.storage.store import Store, report_damage

ROW_GROUP_SIZE = 64
"""Rows of a row group: the unit of reading and of shuffling."""
RECORD = re.compile(r"shard-(\d{5,})\.json")
"""Name of a record."""
_FILE = re.compile(r"(shard-\d{5,}-[0-9a-f]{8}\.(parquet|npz)|projection-[0-9a-f]{8}\.npz)?")

RECORDS = "records.json"
"""Name of the file with the records of all shards of a part, written when they are complete."""
Figures = dict[str, dict[str, float]]
"""Figures of `pipeline.cache.layout.target.fidelity` by token type."""

log = logging.getLogger(__name__)


def record_name(shard: int) -> str:
    """Name of the record that lists a shard."""
    return f"shard-{shard:05d}.json"


def record_numbers(files: Iterable[str]) -> set[int]:
    """Numbers of the shards that have a record among these file names."""
    return {int(match[1]) for name in files if (match := RECORD.fullmatch(name))}


@dataclass(frozen=True)
class ShardRecord:
    """Description of one committed shard.

    Attributes:
        file: name of the Parquet file.
        moments, projection: names of the files of the statistics and of the rows' projection, or "".
        facts: timings in seconds, quarantined samples, fidelity, library versions; for crops and features, also the files
            that they were derived from.
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
class RowGroup:
    """One row group: the number of its part in a list of parts, its shard, its number in the shard's file, and its rows."""

    part: int
    shard: int
    group: int
    rows: int


def evenly_spaced(groups: Sequence[RowGroup], count: int) -> list[RowGroup]:
    """`count` of these row groups, evenly spaced from the first to the last; all if there are fewer."""
    return [groups[i] for i in np.linspace(0, len(groups) - 1, min(count, len(groups))).round().astype(int)]


@dataclass(frozen=True)
class ShardFolder:
    """The shards of a part: of the images, of a view's rows, or of one teacher. Picklable.

    Attributes:
        home: where a teacher's projections are, for all parts.
    """

    store: Store
    row_group_size: int = ROW_GROUP_SIZE
    home: Store | None = None

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
            compression: Parquet's. Features and JPEGs hardly compress; uncompressed, a read is a copy.
            before_listing: called with the record when the files are written and the record is not.

        Raises:
            UserError: if the destination refuses the write; nothing is listed then.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            row_group_size=self.row_group_size,
            compression=compression,
            use_dictionary=False,
            write_statistics=["key"],
            write_page_checksum=True,
        )
        data = sink.getvalue()
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
        self.store.put(record_name(shard), sealed(asdict(record), indent=None))
        return record

    def records(self) -> dict[int, ShardRecord]:
        """Records of the complete shards by number, in order. Reads one file per shard, or one if all were complete before."""
        files = self.store.files()
        if RECORDS in files:
            together, shards = self._read_together(), {name for name in files if name.endswith(".parquet")}
            # A record that was deleted, or a shard that was committed again since then, is not in the one file.
            same = record_numbers(files) == together.keys() and shards == {item.file for item in together.values()}
            if same and len(complete := self.complete(together, files)) == len(together):
                return complete
        return self.complete(self.read_records(record_numbers(files)), files)

    def write_together(self, records: Mapping[int, ShardRecord]) -> None:
        """Write the records of all shards, which are complete, into one file."""
        self.store.put(RECORDS, dump_records(records.values()))

    def _read_together(self) -> dict[int, ShardRecord]:
        """What `write_together` wrote; nothing if that is damaged, since each record has a file of its own."""
        try:
            records = [ShardRecord(**item) for item in unsealed(self.store.get(RECORDS))["records"]]
            for record in records:
                _check_fields(record)
            return {record.shard: record for record in records}
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            log.warning("%s/%s cannot be read (%s): reading the record of every shard", self.store.uri, RECORDS, error)
            return {}

    def complete(self, records: Mapping[int, ShardRecord], files: Mapping[str, int]) -> dict[int, ShardRecord]:
        """The records whose shard is complete, given the folder's files and their sizes.

        A shard is incomplete if its file is missing, differs in size from its record, or was encoded with another
        projection than the folder's; it is then computed again.
        """
        complete: dict[int, ShardRecord] = {}
        projection = self.projection if any(record.projection for record in records.values()) else ""
        for record in records.values():
            if reason := _fault(record, files.get(record.file), projection):
                log.warning("%s/%s %s: it will be computed again", self.store.uri, record.file, reason)
            else:
                complete[record.shard] = record
        return complete

    def listed(self) -> dict[int, ShardRecord]:
        """Every readable record by the shard's number, in order, whether or not the shard's file exists."""
        return self.read_records(record_numbers(self.store.files()))

    def read_records(self, shards: Iterable[int]) -> dict[int, ShardRecord]:
        """The records of these shards, in order, whether or not their files exist; unreadable records are left out."""
        with ThreadPoolExecutor(16) as pool:
            return {record.shard: record for record in pool.map(self.listing, sorted(shards)) if record is not None}

    def listing(self, shard: int) -> ShardRecord | None:
        """The record of one shard, whether or not the shard's file exists; None if it is missing or unreadable."""
        try:
            return self.read_record(shard)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("%s/%s %s: the shard will be computed again", self.store.uri, record_name(shard), error)
            return None

    def read_record(self, shard: int) -> ShardRecord:
        """As `listing`, but FileNotFoundError if there is no record, ValueError if it is not one of this shard."""
        data = self.store.get(record_name(shard))
        try:
            record = ShardRecord(**unsealed(data))
            _check_fields(record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"is not a record ({error})") from error
        if record.shard != shard:
            raise ValueError(f"is the record of shard {record.shard}")
        return record

    def unlist(self, shard: int) -> None:
        """Delete a shard's record, then the files that it names; a file that belongs to another shard stays."""
        record = self.listing(shard)
        self.store.delete(RECORDS)
        self.store.delete(record_name(shard))
        for name in (record.file, record.moments) if record else ():
            if name.startswith(f"shard-{shard:05d}-"):
                self.store.delete(name)

    def record(self, shard: int) -> ShardRecord | None:
        """The record of one shard, read now; None if the shard is not complete."""
        record = self.listing(shard)
        projection = self.projection if record and record.projection else ""
        return record if record and not _fault(record, self.store.size(record.file), projection) else None

    @property
    def projection(self) -> str:
        """Name of the teacher's projection; "" while there is none."""
        return projection_in(self.home) if self.home else ""

    def read(self, record: ShardRecord, columns: list[str] | None = None) -> pa.Table:
        """All rows of a shard; UserError if the file is missing or damaged."""
        with report_damage(f"{self.store.uri}/{record.file}"):
            file = self.store.open(record.file)
            return selected(pq.read_table(file, columns=columns, page_checksum_verification=True), columns)

    def part_stats(self) -> PartStats | None:
        """The statistics that the shards of a teacher have together; None before they are merged, UserError if damaged."""
        with report_damage(f"{self.store.uri}/{STATISTICS}"):
            try:
                return load_part_stats(self.store.get(STATISTICS))
            except FileNotFoundError:
                return None

    def moments(self, records: Iterable[ShardRecord]) -> list[Mapping[str, Moments]]:
        """Statistics of these shards: merged if they are all, otherwise of each, in order; those without features have none."""
        records = [record for record in records if record.moments]
        if whole := self._together(records):
            return [whole]
        with ThreadPoolExecutor(4) as pool:
            own = [*pool.map(self._own_moments, records)]
        if None in own and (whole := self._together(records)):  # another job has merged them meanwhile
            return [whole]
        return [found or self.shard_moments(record) for found, record in zip(own, records, strict=True)]

    def _together(self, records: Sequence[ShardRecord]) -> Mapping[str, Moments] | None:
        """The merged statistics, if they are of these shards and no others."""
        stats = self.part_stats()
        return stats.together if stats and [*stats.shards] == [record.file for record in records] else None

    def shard_moments(self, record: ShardRecord) -> Mapping[str, Moments]:
        """Statistics of a shard: from a file of its own or, once that is gone, rounded; UserError if they are lost or damaged."""
        if found := self._own_moments(record):
            return found
        with report_damage(f"{self.store.uri}/{record.moments}"):
            together = self.part_stats()
            if together is None or record.file not in together.shards:
                raise FileNotFoundError("it is missing")
            return together.shards[record.file]

    def _own_moments(self, record: ShardRecord) -> Mapping[str, Moments] | None:
        """Statistics of a shard from a file of its own; None if there is none, UserError if it is damaged."""
        with report_damage(f"{self.store.uri}/{record.moments}"):
            try:
                return load_moments(self.store.get(record.moments))
            except FileNotFoundError:
                return None

    def merge_statistics(self, records: Mapping[int, ShardRecord]) -> None:
        """Write the statistics of all shards, which are complete, into one file, and delete those of each."""
        names, counted = self.store.files(), [record for record in records.values() if record.moments]
        if not (single := [record for record in counted if record.moments in names]):
            return
        present = self.part_stats()
        kept = present.shards if present else {}
        with ThreadPoolExecutor(16) as pool:
            own = {}
            for record, found in zip(single, pool.map(self._own_moments, single), strict=True):
                if found is None:  # another job has merged them, and deletes them now
                    return
                own[record.file] = found
            # A shard that was computed again has the same name if it has the same features.
            same = present and all(present.says(file, found) for file, found in own.items() if file in kept)
            if not same or [*kept] != [record.file for record in counted]:
                known = {**kept, **own}
                shards = {item.file: known.get(item.file) or self.shard_moments(item) for item in counted}
                self.store.put(STATISTICS, dump_part_stats(PartStats.of(shards)))
            [*pool.map(self.store.delete, [record.moments for record in single])]


def _check_fields(record: ShardRecord) -> None:
    """Raise ValueError unless the fields are valid, above all the file names, which must not lead out of the folder."""
    counts, names = (record.shard, record.rows, record.bytes), (record.file, record.moments, record.projection)
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not isinstance(record.facts, dict):
        raise ValueError("a field has the wrong type")
    if not record.file or not all(_FILE.fullmatch(name) for name in names):
        raise ValueError("it names a file that is no shard file")


def keys_of(table: pa.Table) -> list[tuple[str, int]]:
    """Key, in hexadecimal digits, and view of every row."""
    return [(key.hex(), view) for key, view in zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True)]


def in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; `combine_chunks` would copy even a single chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """A ``fixed_size_binary`` column as a read-only [N, width] uint8 view, without a copy."""
    array = in_one_piece(column)
    width = array.type.byte_width
    if not len(array):
        return np.empty((0, width), np.uint8)
    rows = np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, width)
    return rows[array.offset : array.offset + len(array)]


def selected(table: pa.Table, columns: list[str] | None) -> pa.Table:
    """These columns of a table; KeyError if one is missing, which Parquet's reader ignores."""
    return table if columns is None else table.select(columns)


def projection_in(home: Store) -> str:
    """Name of the projection in a teacher's folder; "" while there is none."""
    return min((name for name in home.files() if name.startswith("projection-")), default="")


def add_projection(home: Store, data: bytes) -> None:
    """Write a projection, named after its content. If two processes add one each, every reader picks the same one."""
    home.put(f"projection-{hashlib.sha256(data).hexdigest()[:8]}.npz", data)


def _fault(record: ShardRecord, size: int | None, projection: str) -> str:
    """Why a recorded shard is not complete, or ""."""
    if size is None:
        return "is missing"
    if size != record.bytes:
        return f"has {size} bytes, its record says {record.bytes}"
    return "was encoded with another projection" if record.projection != projection else ""


def dump_records(records: Iterable[ShardRecord]) -> bytes:
    """Records as JSON, with a checksum."""
    return sealed({"records": [asdict(record) for record in records]}, indent=None)


def merge_figures(parts: Iterable[tuple[Mapping[str, Mapping[str, float]], int]]) -> Figures:
    """Figures of fidelity over parts with their rows: means by rows, but the lowest 1st percentile.

    A figure that nothing was measured for is left out.
    """
    known, merged = list(parts), Figures()
    for kind in dict.fromkeys(kind for figures, _ in known for kind in figures):
        found = [(figures[kind], rows) for figures, rows in known if kind in figures]
        merged[kind] = {}
        for name in ("target_cosine", "target_cosine_p1", "relative_error"):
            if measured := [(figures[name], rows) for figures, rows in found if name in figures]:
                values, counts = zip(*measured, strict=True)
                merged[kind][name] = min(values) if name == "target_cosine_p1" else fmean(values, counts)
    return merged
