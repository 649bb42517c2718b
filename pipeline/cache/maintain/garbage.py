"""Files of a cache that nothing refers to: left by killed writers, or replaced when a shard was computed again.

Only files with names that the cache itself gives count as garbage, and only once they are old: a running job writes a
shard's files moments before their record (`FILE_AGE_S`), and a teacher's description possibly hours before its first shard
(`FOLDER_AGE_S`). A training that started before a repair may still read the replaced files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.cache.layout.shards import ShardFolder, record_numbers
from pipeline.storage.store import Store

FILE_AGE_S = 3600.0
"""Age in seconds at which a file that no record names counts as garbage."""
FOLDER_AGE_S = 24 * 3600.0
"""Age in seconds of its newest file at which a folder without any record counts as garbage."""
_SHARD_FILE = re.compile(r"shard-(\d{5,})-[0-9a-f]{8}\.(parquet|npz)")
_PROJECTION = re.compile(r"projection-[0-9a-f]{8}\.npz")
_OURS = re.compile(
    rf"(teacher|view|shard-\d{{5,}})\.json|index\.parquet|(stats|phi_s)\.npz|{_PROJECTION.pattern}|{_SHARD_FILE.pattern}"
)
_DATASET = re.compile(r".+-[0-9a-f]{8}")


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
    """List all garbage of a cache; removes nothing."""
    return [item for name in cache.folders() if _DATASET.fullmatch(name) for item in _dataset(cache.sub(name))]


def remove_garbage(items: Sequence[Garbage]) -> None:
    """Remove these files and the folders that become empty."""
    for item in items:
        item.store.delete(item.name)
    for folder in dict.fromkeys(item.store for item in items):
        if not folder.files() and not folder.folders():
            folder.delete_folder()


def _dataset(store: Store) -> Iterator[Garbage]:
    below = list(_below(store))
    for folder in below:
        yield from (Garbage(folder, name, size, "left by a killed writer") for name, size in folder.leftovers().items())
    if not store.exists("dataset.json"):
        yield from _all_if_old(below, "it belongs to no dataset")
        return
    views = store.sub("views")
    for view in map(views.sub, views.folders()):
        for part in ("images", "rows"):
            yield from _unnamed(view.sub(part))
        teachers = view.sub("teachers")
        for teacher in map(teachers.sub, teachers.folders()):
            if record_numbers(teacher.files()):
                yield from _unnamed(teacher)
            else:
                yield from _all_if_old([teacher], "its folder has no shard")


def _below(store: Store) -> Iterator[Store]:
    yield store
    for name in store.folders():
        yield from _below(store.sub(name))


def _unnamed(store: Store) -> Iterator[Garbage]:
    folder = ShardFolder(store)
    listed = folder.listed()
    # Files of a shard whose record cannot be read are left to --verify.
    doubtful = record_numbers(store.files()) - set(listed)
    named = {name for record in listed.values() for name in (record.file, record.moments, record.projection)}
    for name, size in store.files(FILE_AGE_S).items():
        match = _SHARD_FILE.fullmatch(name)
        unnamed = match and int(match[1]) not in doubtful
        if (unnamed or (_PROJECTION.fullmatch(name) and name != folder.projection)) and name not in named:
            yield Garbage(store, name, size, "no record names it")


def _all_if_old(folders: Sequence[Store], why: str) -> Iterator[Garbage]:
    if all(folder.files().keys() == folder.files(FOLDER_AGE_S).keys() for folder in folders):
        for folder in folders:
            ours = {name: size for name, size in folder.files().items() if _OURS.fullmatch(name)}
            yield from (Garbage(folder, name, size, why) for name, size in ours.items())
