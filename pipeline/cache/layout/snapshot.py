"""The shard records that one job has read."""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.cache.layout.shards import Figures, ShardFolder, ShardRecord, merge_figures
from pipeline.runtime.prefetch import map_ahead
from pipeline.storage.files import THREADS

FOLDERS_HELD = 1024
"""Folders whose records are kept in memory; a summary is kept of all."""


@dataclass(frozen=True)
class Summary:
    """The complete shards of a folder: their numbers, rows, bytes and merged fidelity."""

    shards: frozenset[int]
    rows: int
    bytes: int
    fidelity: Figures


class RecordSnapshot:
    """The records of the shards in several folders, as of when they were first asked for.

    A job asks for the records of a folder a dozen times: in the plan, while filling, and in every reader. The data sets of a
    job share one snapshot, and whoever commits shards refreshes it. Another process starts with an empty one. Code that writes
    a shard asks the store itself (`ShardFolder.record`), because a snapshot may be hours old.
    """

    def __init__(self) -> None:
        self._summaries: dict[str, Summary] = {}
        self._records: OrderedDict[str, dict[int, ShardRecord]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def records(self, folder: ShardFolder) -> dict[int, ShardRecord]:
        """Records of the folder's complete shards by number, in order."""
        uri = folder.store.uri
        if uri not in self._records:
            self._read(folder)
        self._records.move_to_end(uri)
        return self._records[uri]

    def summary(self, folder: ShardFolder) -> Summary:
        """What the folder holds."""
        if folder.store.uri not in self._summaries:
            self._read(folder)
        return self._summaries[folder.store.uri]

    def read_ahead(self, folders: Iterable[ShardFolder]) -> None:
        """Read what these folders hold at the same time, since each waits for the store or the disk."""
        unread = [folder for folder in folders if folder.store.uri not in self._summaries]
        if len(unread) > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in map_ahead(pool, self._read, unread, THREADS):
                    pass

    def refresh(self, below: str) -> None:
        """Forget what was read of the folders at or below the URI `below`."""
        for known in (self._summaries, self._records):
            for uri in [uri for uri in known if f"{uri}/".startswith(f"{below}/")]:
                del known[uri]

    def _read(self, folder: ShardFolder) -> None:
        uri, records = folder.store.uri, folder.records()
        kept = [record for record in records.values() if record.rows]
        fidelity = merge_figures((record.facts.get("fidelity", {}), record.rows) for record in kept)
        rows, size = sum(record.rows for record in kept), sum(record.bytes for record in kept)
        self._summaries[uri] = Summary(frozenset(records), rows, size, fidelity)
        self._records[uri] = records
        if len(self._records) > FOLDERS_HELD:
            self._records.popitem(last=False)
