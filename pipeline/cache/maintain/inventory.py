"""The contents of a cache, read from the cache alone, without source, teacher or recipe."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.cache.layout.cached_teacher import merged_fidelity
from pipeline.cache.layout.dataset import read_meta
from pipeline.cache.layout.shards import ShardFolder
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE
from pipeline.storage.store import Store


@dataclass(frozen=True)
class Entry:
    """A part of a cache that has an address: a dataset, its crops, or a teacher's features.

    Attributes:
        address: ``<dataset>``, ``<dataset>/<view>`` or ``<dataset>/<view>/<teacher>``.
        shards, of: number of complete shards, and of all shards.
        bytes: size of all files below the folder.
        fidelity: mean cosine between a standardised patch and its decoded value; None for images, crops, and if not measured.
        licence: of a teacher's weights; "" for images and crops.
    """

    address: str
    store: Store
    what: str
    shards: int
    of: int
    bytes: int
    fidelity: float | None = None
    licence: str = ""


def take_inventory(cache: Store) -> list[Entry]:
    """All entries of a cache: each dataset, followed by its crops and teachers."""
    return [entry for name in cache.folders() for entry in _dataset(cache.sub(name), name)]


def find_entry(cache: Store, address: str) -> Entry:
    """The entry with this address; UserError if there is none, naming the closest one."""
    entries = {entry.address: entry for entry in take_inventory(cache)}
    if address in entries:
        return entries[address]
    near = difflib.get_close_matches(address, entries, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--delete: {cache.uri} holds no {address}; {hint}--list prints the addresses")


def _dataset(store: Store, name: str) -> Iterator[Entry]:
    if not store.exists("dataset.json"):
        return
    try:
        meta = read_meta(store)
    except UserError:
        yield Entry(name, store, "another version of the cache, or damaged", 0, 0, store.bytes_below())
        return
    shards = -(-meta["count"] // meta["shard_size"])
    done = len(ShardFolder(store.sub(f"views/{WHOLE.id}/images")).records())
    what = f"{meta['count']} images of {meta['location']}"
    yield Entry(name, store, what, done, shards, store.bytes_below())
    for view in store.sub("views").folders():
        yield from _view(store.sub(f"views/{view}"), f"{name}/{view}", shards)


def _view(store: Store, address: str, shards: int) -> Iterator[Entry]:
    if not address.endswith(f"/{WHOLE.id}"):
        done = len(ShardFolder(store.sub("rows")).records())
        yield Entry(address, store, "crops", done, shards, store.bytes_below())
    for name in store.sub("teachers").folders():
        yield _teacher(store.sub(f"teachers/{name}"), f"{address}/{name}", shards)


def _teacher(store: Store, address: str, shards: int) -> Entry:
    records = ShardFolder(store).records().values()
    try:
        described = dict(json.loads(store.get("teacher.json")))
    except (FileNotFoundError, ValueError, TypeError):
        described = {}  # --verify reports it
    kept = merged_fidelity(records, ["patches"])["patches"]
    what = f"{described.get('name', '?')} {described.get('weights', '?')[:20]}, {described.get('codec', '?')}"
    fidelity, licence = kept.get("target_cosine"), described.get("licence", "unknown")
    return Entry(address, store, what, len(records), shards, store.bytes_below(), fidelity, licence)


def delete_entry(entry: Entry) -> None:
    """Delete all files of an entry. A dataset's dataset.json goes first, so that half a dataset is never taken for a whole."""
    entry.store.delete("dataset.json")
    entry.store.delete_folder()
