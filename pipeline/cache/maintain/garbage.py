"""Files of a cache that nothing refers to: left by killed writers, or replaced when a shard was computed again.

Only files with names that the cache itself gives count as garbage, and only once they are old: a running job writes a
shard's files moments before their record (`FILE_AGE_S`), and a teacher's description possibly hours before its first shard
(`FOLDER_AGE_S`). A training that started before a repair may still read the replaced files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.cache.layout.dataset import Dataset, read_version
from pipeline.cache.layout.shards import ShardFolder, projection_in, record_numbers
from pipeline.storage.store import Store

FILE_AGE_S = 3600.0
"""Age in seconds at which a file that no record names counts as garbage."""
FOLDER_AGE_S = 24 * 3600.0
"""Age in seconds of its newest file at which a folder without any record counts as garbage."""
_SHARD_FILE = re.compile(r"shard-(\d{5,})-[0-9a-f]{8}\.(parquet|npz)")
_SAMPLES = re.compile(r"(rows|bad)-[0-9a-f]{16}\.parquet")
_OURS = re.compile(
    rf"(teacher|view|part|records|shard-\d{{5,}})\.json|index\.parquet|(stats|statistics|phi_s|projection-[0-9a-f]{{8}})\.npz|{_SHARD_FILE.pattern}"
)
_PART = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Garbage:
    """A file to be removed, and the reason."""

    store: Store
    name: str
    bytes: int
    why: str

    @property
    def path(self) -> str:
        """Its full path or URI."""
        return f"{self.store.uri}/{self.name}"


def find_garbage(cache: Store) -> list[Garbage]:
    """List all garbage of a cache; removes nothing.

    Raises:
        UserError: if a version of a data set cannot be read, since what it needs is then unknown.
    """
    named: set[str] = set()
    found: list[Garbage] = []
    for folder in cache.sub("datasets").folders():
        datasets = list(_versions(cache, folder))
        named |= {chosen.part for dataset in datasets for chosen in dataset.selections}
        found += _dataset(cache.sub(f"datasets/{folder}"), datasets)
    parts = cache.sub("parts")
    for name in filter(_PART.fullmatch, parts.folders()):
        found += _part(parts.sub(name), name in named)
    teachers = cache.sub("teachers")
    for home in map(teachers.sub, teachers.folders()):
        found += _leftovers(home)
        found += _projections(home)
    return found


def remove_garbage(items: Sequence[Garbage]) -> None:
    """Remove these files and the folders that become empty."""
    for item in items:
        item.store.delete(item.name)
    for folder in dict.fromkeys(item.store for item in items):
        if not folder.files() and not folder.folders():
            folder.delete_folder()


def _versions(cache: Store, folder: str) -> Iterator[Dataset]:
    for name in cache.sub(f"datasets/{folder}").files():
        if name.startswith("version-"):
            yield read_version(cache, folder, name).dataset


def _dataset(store: Store, datasets: Sequence[Dataset]) -> Iterator[Garbage]:
    """Files of samples that no version names, and statistics of versions that are gone."""
    yield from _leftovers(store)
    named = {chosen.file for dataset in datasets for chosen in dataset.selections} | {
        dataset.bad for dataset in datasets
    }
    for name, size in store.files(FILE_AGE_S).items():
        if _SAMPLES.fullmatch(name) and name not in named:
            yield Garbage(store, name, size, "no version names it")
    statistics, known = store.sub("statistics"), {dataset.fingerprint[:16] for dataset in datasets}
    for name in statistics.folders():
        if name not in known:
            yield from _all_if_old([*_below(statistics.sub(name))], "its version is gone")


def _part(store: Store, named: bool) -> Iterator[Garbage]:
    below = list(_below(store))
    for folder in below:
        yield from _leftovers(folder)
    if not named:
        yield from _all_if_old(below, "no data set has its images")
        return
    views = store.sub("views")
    for view in map(views.sub, views.folders()):
        for what in ("images", "rows"):
            yield from _unnamed(view.sub(what))
        teachers = view.sub("teachers")
        for teacher in map(teachers.sub, teachers.folders()):
            if record_numbers(teacher.files()):
                yield from _unnamed(teacher)
            else:
                yield from _all_if_old([teacher], "its folder has no shard")


def _leftovers(store: Store) -> Iterator[Garbage]:
    yield from (Garbage(store, name, size, "left by a killed writer") for name, size in store.leftovers().items())


def _projections(home: Store) -> Iterator[Garbage]:
    """Projections of a teacher beside the one that every reader picks."""
    for name, size in home.files(FILE_AGE_S).items():
        if name.startswith("projection-") and name != projection_in(home):
            yield Garbage(home, name, size, "no record names it")


def _below(store: Store) -> Iterator[Store]:
    yield store
    for name in store.folders():
        yield from _below(store.sub(name))


def _unnamed(store: Store) -> Iterator[Garbage]:
    listed = ShardFolder(store).listed()
    # Files of a shard whose record cannot be read are left to --verify.
    doubtful = record_numbers(store.files()) - set(listed)
    both = [*listed.values(), *ShardFolder(store).records().values()]
    named = {name for record in both for name in (record.file, record.moments)}
    for name, size in store.files(FILE_AGE_S).items():
        match = _SHARD_FILE.fullmatch(name)
        if match and int(match[1]) not in doubtful and name not in named:
            yield Garbage(store, name, size, "no record names it")


def _all_if_old(folders: Sequence[Store], why: str) -> Iterator[Garbage]:
    if all(folder.files().keys() == folder.files(FOLDER_AGE_S).keys() for folder in folders):
        for folder in folders:
            ours = {name: size for name, size in folder.files().items() if _OURS.fullmatch(name)}
            yield from (Garbage(folder, name, size, why) for name, size in ours.items())
