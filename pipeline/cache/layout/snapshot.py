"""The shard records that one job has read."""

from collections.abc import Iterable

from pipeline.cache.layout.shards import ShardFolder, ShardRecord, record_numbers


class RecordSnapshot:
    """The records of the shards in several folders; each record is read from the store once. And which datasets' images were
    compared with their source (`compared`, by URI), as the phases of a job share them.

    A record is a small file, and a job asks for the records of a folder a dozen times: in the plan, while filling, and in
    every reader. The datasets of a job share one snapshot, and whoever commits shards refreshes it. It is picklable, so
    that training workers read no record again. Code that writes a shard asks the store itself (`ShardFolder.record`),
    because a snapshot may be hours old.
    """

    def __init__(self) -> None:
        self.compared: set[str] = set()
        self._folders: dict[str, ShardFolder] = {}
        self._listed: dict[str, dict[int, ShardRecord]] = {}
        self._complete: dict[str, dict[int, ShardRecord]] = {}

    def records(self, folder: ShardFolder) -> dict[int, ShardRecord]:
        """Records of the folder's complete shards by number, in order, as of the last refresh."""
        if folder.store.uri not in self._folders:
            self._read(folder, None)
        return self._complete[folder.store.uri]

    def refresh(self, below: str, shards: Iterable[int] | None = None) -> None:
        """Read the records of these shards (None: of all) again in every known folder at or below the URI `below`.

        Folders that nobody has asked for are not read. All known shards are checked against the files that exist now.
        """
        chosen = None if shards is None else set(shards)
        for uri, folder in self._folders.items():
            if f"{uri}/".startswith(f"{below}/"):
                self._read(folder, chosen)

    def _read(self, folder: ShardFolder, shards: set[int] | None) -> None:
        uri, files = folder.store.uri, folder.store.files()
        present = record_numbers(files)
        known = {} if shards is None else {n: r for n, r in self._listed[uri].items() if n in present - shards}
        read = folder.read_records(present if shards is None else present & shards)
        self._folders[uri] = folder
        self._listed[uri] = dict(sorted({**known, **read}.items()))
        self._complete[uri] = folder.complete(self._listed[uri], files)
