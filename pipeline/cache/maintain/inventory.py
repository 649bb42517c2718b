"""The contents of a cache, read from the cache alone, without source, teacher or recipe."""

import difflib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from pipeline.cache.fill.staging import staging_folder
from pipeline.cache.layout.dataset import Dataset, Version, read_version, used_by
from pipeline.cache.layout.part import Part, read_part, teacher_home
from pipeline.cache.layout.shards import ShardFolder, ShardRecord, merge_figures
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE
from pipeline.storage.store import DamagedError, Store


@dataclass(frozen=True)
class Entry:
    """Something in a cache that has an address: a version of a data set, images, crops, a teacher's features, what is staged.

    Attributes:
        address: ``<data set>/<version>``, ``images``, the name of a view, a teacher's id, or ``staging``.
        shards, of: number of complete shards, and of all shards.
        bytes: size of all its files.
        stores: the folders that hold them; or one folder, and the `file` in it.
        fidelity: mean cosine between a standardised patch and its decoded value; None for anything but features, and if not
            measured.
        licence: of a teacher's weights; "" for anything else.
    """

    address: str
    what: str
    shards: int
    of: int
    bytes: int
    stores: tuple[Store, ...]
    file: str = ""
    fidelity: float | None = None
    licence: str = ""


def take_inventory(cache: Store) -> list[Entry]:
    """All entries of a cache."""
    parts = [part for name in cache.sub("parts").folders() if (part := read_part(cache, name))]
    return [*_versions(cache, parts), *_images(parts), *_teachers(cache, parts), *_staged(cache), *_earlier(cache)]


def find_entry(cache: Store, address: str) -> Entry:
    """The entry with this address; UserError if there is none, naming the closest one."""
    entries = {entry.address: entry for entry in take_inventory(cache)}
    if address in entries:
        return entries[address]
    near = difflib.get_close_matches(address, entries, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--delete: {cache.uri} holds no {address}; {hint}--list prints the addresses")


def delete_entry(entry: Entry) -> None:
    """Delete all files of an entry."""
    for store in entry.stores:
        if entry.file:
            store.delete(entry.file)
        else:
            store.delete_folder()


def _versions(cache: Store, parts: Sequence[Part]) -> Iterator[Entry]:
    done = {part.id: len(part.images.records()) for part in parts}
    for folder in cache.sub("datasets").folders():
        store = cache.sub(f"datasets/{folder}")
        files = store.files()
        names = sorted(name for name in files if name.startswith("version-"))
        versions = []
        for name in names:
            try:
                versions.append(read_version(cache, folder, name))
            except UserError:
                yield Entry(
                    f"{folder}/{name}", "another version of the cache, or damaged", 0, 0, files[name], (store,), name
                )
        changed = (_change(before.dataset, after.dataset) for before, after in pairwise(versions))
        changes = ["", *changed] if versions else []
        for version, change in zip(versions, changes, strict=True):
            dataset, bytes_ = version.dataset, files[version.file]
            shards = sum(done.get(chosen.part, 0) for chosen in dataset.selections)
            what = f"{dataset.count} images of {dataset.location}{change}, {_when(version)}{_runs(dataset)}"
            address = f"{folder}/{dataset.fingerprint[:8]}"
            yield Entry(
                address, what, shards, sum(part.shards for part in dataset.parts), bytes_, (store,), version.file
            )


def _when(version: Version) -> str:
    return datetime.fromtimestamp(version.made, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _runs(dataset: Dataset) -> str:
    runs = used_by(dataset)
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f", used by {', '.join(runs[:3])}{more}" if runs else ""


def _change(before: Dataset, after: Dataset) -> str:
    """How many images a version has gained and lost; files of samples that both have are not read."""
    shared = {chosen.file for chosen in before.selections} & {chosen.file for chosen in after.selections}
    keys = []
    for dataset in (before, after):
        numbers = [number for number, chosen in enumerate(dataset.selections) if chosen.file not in shared]
        try:
            keys.append({key for number in numbers for key in dataset.samples(number, ["key"])["key"].to_pylist()})
        except DamagedError:
            return ", with damaged files: see --verify"
    return f", {len(keys[1] - keys[0])} added, {len(keys[0] - keys[1])} removed"


def _images(parts: Sequence[Part]) -> Iterator[Entry]:
    if not parts:
        return
    stores = tuple(part.images.store for part in parts)
    what = f"{sum(part.count for part in parts)} images in {len(parts)} parts"
    done, of = sum(len(part.images.records()) for part in parts), sum(part.shards for part in parts)
    around = sum(sum(part.store.files().values()) for part in parts)
    yield Entry("images", what, done, of, around + sum(store.bytes_below() for store in stores), stores)
    crops: defaultdict[str, list[Part]] = defaultdict(list)
    for part in parts:
        for view in part.store.sub("views").folders():
            if view != WHOLE.id:
                crops[view].append(part)
    for view, some in crops.items():
        stores = tuple(part.store.sub(f"views/{view}/rows") for part in some)
        done, of = sum(len(ShardFolder(store).records()) for store in stores), sum(part.shards for part in some)
        yield Entry(view, "crops", done, of, sum(store.bytes_below() for store in stores), stores)


def _teachers(cache: Store, parts: Sequence[Part]) -> Iterator[Entry]:
    folders: defaultdict[str, list[tuple[Part, Store]]] = defaultdict(list)
    for part in parts:
        for view in part.store.sub("views").folders():
            teachers = part.store.sub(f"views/{view}/teachers")
            for teacher in teachers.folders():
                folders[teacher].append((part, teachers.sub(teacher)))
    for teacher in sorted({*cache.sub("teachers").folders(), *folders}):
        yield _teacher(cache, teacher, folders[teacher])


def _teacher(cache: Store, teacher: str, folders: Sequence[tuple[Part, Store]]) -> Entry:
    home, records = teacher_home(cache, teacher), list[ShardRecord]()
    for _, store in folders:
        records += ShardFolder(store, home=home).records().values()
    try:
        described = dict(json.loads(home.get("teacher.json")))
    except (FileNotFoundError, ValueError, TypeError):
        described = {}  # --verify reports it
    kept = merge_figures((record.facts.get("fidelity", {}), record.rows) for record in records).get("patches", {})
    what = f"{described.get('name', '?')} {described.get('weights', '?')[:20]}, {described.get('codec', '?')}"
    what += f", {described['share']:g} of the images" if "share" in described else ""
    stores = (home, *(store for _, store in folders))
    fidelity, licence = kept.get("target_cosine"), described.get("licence", "unknown")
    of, size = sum(part.shards for part, _ in folders), sum(store.bytes_below() for store in stores)
    return Entry(teacher, what, len(records), of, size, stores, "", fidelity, licence)


def _staged(cache: Store) -> Iterator[Entry]:
    """What jobs have read of archives and not stored yet."""
    store = staging_folder(cache)
    if archives := store.folders():
        what = f"images of {len(archives)} archives, kept until a version lists them"
        yield Entry("staging", what, 0, 0, store.bytes_below(), (store,))


def _earlier(cache: Store) -> Iterator[Entry]:
    """Data sets of the format before, which kept the features of each below its own folder."""
    for name in cache.folders():
        store = cache.sub(name)
        if store.exists("dataset.json"):
            yield Entry(
                name,
                "a data set of cache format 2, which this version does not read",
                0,
                0,
                store.bytes_below(),
                (store,),
            )
