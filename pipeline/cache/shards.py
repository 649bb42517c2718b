"""A folder of committed Parquet shards: a shard that is listed is complete.

    shard-00042-3fa9c1d2.parquet   the rows; the name carries the first digits of the file's SHA-256
    shard-00042-3fa9c1d2.npz       statistics of the shard, where there are any
    shard-00042.json               the record that lists it, written last: rows, bytes, SHA-256, timings

The record is one file a shard, not a line in a shared log: object stores cannot append, and two writers of one shard
replace one whole record by another that names its own file, so that neither harms the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.stats import Moments, dump_moments, load_moments
from pipeline.cache.store import Store

ROW_GROUP_SIZE = 64
"""Rows of a row group: what a training worker reads at once, and what is shuffled as a unit."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one committed shard.

    Attributes:
        shard: its number in the dataset.
        file: name of the Parquet file.
        rows, bytes, sha256: of that file.
        moments: name of the statistics file, or "".
        facts: timings in seconds, quarantined samples, fidelity, library versions.
    """

    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str
    moments: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFolder:
    """The shards of the images, or of one teacher. Picklable."""

    store: Store

    def commit(
        self,
        shard: int,
        table: pa.Table,
        moments: dict[str, Moments] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> ShardRecord:
        """Write a shard, its statistics, and then the record that lists it.

        Raises:
            UserError: where the destination refuses the write; nothing is listed then.
        """
        data = _parquet_bytes(table)
        sha256 = hashlib.sha256(data).hexdigest()
        stem = f"shard-{shard:05d}-{sha256[:8]}"
        self.store.put(f"{stem}.parquet", data)
        if moments:
            self.store.put(f"{stem}.npz", dump_moments(moments))
        record = ShardRecord(
            shard, f"{stem}.parquet", table.num_rows, data.size, sha256, f"{stem}.npz" if moments else "", facts or {}
        )
        self.store.put(f"shard-{shard:05d}.json", json.dumps(asdict(record), sort_keys=True).encode())
        return record

    def records(self) -> dict[int, ShardRecord]:
        """Records of the complete shards by number, in order.

        A shard whose file is gone or has another size than recorded is not listed, so that it is computed again.
        """
        files = self.store.files()
        names = [name for name in files if name.startswith("shard-") and name.endswith(".json")]
        with ThreadPoolExecutor(16) as pool:
            records = [ShardRecord(**json.loads(data)) for data in pool.map(self.store.get, names)]
        for record in records:
            if files.get(record.file) != record.bytes:
                size = files.get(record.file)
                found = "is missing" if size is None else f"has {size} bytes, its record says {record.bytes}"
                log.warning("%s/%s %s: it will be computed again", self.store.uri, record.file, found)
        return {r.shard: r for r in sorted(records, key=lambda r: r.shard) if files.get(r.file) == r.bytes}

    def record(self, shard: int) -> ShardRecord | None:
        """The record of one shard, or None where it is not complete."""
        name = f"shard-{shard:05d}.json"
        if not self.store.exists(name):
            return None
        record = ShardRecord(**json.loads(self.store.get(name)))
        return record if self.store.size(record.file) == record.bytes else None

    def read(self, record: ShardRecord, columns: list[str] | None = None) -> pa.Table:
        """All rows of a shard."""
        return pq.read_table(self.store.open(record.file), columns=columns)

    def moments(self, records: Iterable[ShardRecord]) -> list[dict[str, Moments]]:
        """Statistics of these shards, in their order."""
        return [load_moments(self.store.get(record.moments)) for record in records]


def _parquet_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # Features and JPEGs do not compress: no codec keeps the read at the speed of a copy.
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_SIZE,
        compression="none",
        use_dictionary=False,
        write_statistics=["sample_id"],
    )
    return sink.getvalue()
