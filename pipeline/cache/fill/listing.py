"""What a source lists now beside what its data set's latest version knows: only files that are new or have changed are read.

A row is known if place (URI and offset), size and version of its file are those that a version was made of. What a known image
is called and how it is labelled may change. Tars and Parquet files that are known are not even opened, and the samples of parts
that hold no others are not read. New tars of a store are not opened either: they are read once, when the cache is filled.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.fill.places import PLACE, Places
from pipeline.cache.layout.dataset import (
    BAD_SCHEMA,
    SAMPLE_SCHEMA,
    Dataset,
    Selection,
    Version,
    make_dataset,
    read_versions,
)
from pipeline.cache.layout.part import Part
from pipeline.sources.base import INDEX_SCHEMA, NoImagesError, Source
from pipeline.sources.hold_out import HoldOut
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.left_out import notes_of
from pipeline.sources.streamed import streamed
from pipeline.storage.files import Entry
from pipeline.storage.store import DamagedError

VERSIONS = 8
"""Latest versions among which one of the same location is looked for."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a source lists, compared with a version of its data set.

    Attributes:
        known: rows of `SAMPLE_SCHEMA` by the id of their part.
        bad: rows of `BAD_SCHEMA` that are known.
        new: rows of `INDEX_SCHEMA` that nobody has read.
        kept: selections of a version that stay as they are, with that version, by the id of their part.
        notes: what the source has passed over, in phrases, as far as it was listed anew.
        parts: those of the version, in order.
        damaged: names of the version's files that cannot be read; what they list is new.
        unopened: archives of a `StreamedSource` that nobody has read.
        expected: number and at most the bytes of their images, if that is known.
    """

    known: dict[str, pa.Table]
    bad: pa.Table
    new: pa.Table
    kept: dict[str, tuple[Selection, Dataset]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    damaged: tuple[str, ...] = ()
    unopened: tuple[Entry, ...] = ()
    expected: tuple[int, int] | None = None

    @property
    def is_known(self) -> bool:
        """Whether nothing has to be read."""
        return not (self.new.num_rows or self.unopened)

    def samples(self, part: str) -> pa.Table:
        """All known samples in a part."""
        if part in self.known:
            return self.known[part]
        if part not in self.kept:
            return SAMPLE_SCHEMA.empty_table()
        chosen, dataset = self.kept[part]
        return dataset.samples(dataset.selections.index(chosen))


def list_source(source: Source, empty: Dataset) -> tuple[Listing, Dataset]:
    """What a source lists, and the version of its data set as far as it is known.

    Args:
        empty: the data set without samples.

    Raises:
        UserError: if the source cannot be listed, or lists nothing.
    """
    stream = streamed(source)
    archives = {entry.path: entry for entry in stream.archives()} if stream else {}
    files = {uri: entry.version for uri, entry in archives.items()} if stream else source.versions()
    empty = replace(empty, files=tuple(sorted(files.items())))
    latest = latest_version(empty)
    before = latest.dataset if latest else None
    if before and files and before.classes == empty.classes:
        listing = _compare_files(source, files, before, archives)
    elif archives:
        listing = _compare_archives(source, archives, before)
    else:
        listing, listed = _list(source, empty, before)
        empty = replace(empty, listed=listed)
    pa.default_memory_pool().release_unused()  # a pool keeps what the pieces of an index took
    if stream and listing.unopened:
        expected = stream.count([archive.path for archive in listing.unopened])
        listing = replace(listing, expected=expected, notes=listing.notes or tuple(stream.notes(())))
    return listing, make_dataset(empty, listing.parts, listing.known, listing.bad, listing.kept)


def _list(source: Source, empty: Dataset, before: Dataset | None) -> tuple[Listing, tuple[str, int]]:
    """What a source lists, compared with a version, and :attr:`~pipeline.cache.layout.dataset.Dataset.listed`."""
    now = source.listed() if isinstance(source, HoldOut | ImageFolder) else None
    if now and before and before.location == empty.location and before.listed[0] == now.digest:
        same = _same(before)
        if same is not None:
            return replace(same, notes=now.notes), before.listed
    index = now.index() if now else source.index()
    listed = (now.digest, index.num_rows) if now else ("", 0)
    return replace(_compare(index, before), notes=tuple(notes_of(index))), listed


def _same(before: Dataset) -> Listing | None:
    """A version as a listing in which nothing has changed; None if it cannot be read in full."""
    kept = {chosen.part: (chosen, before) for chosen in before.selections}
    readable = all(_readable(partial(before.samples, number)) is not None for number in range(len(kept)))
    bad = _readable(before.bad_samples) if readable else None
    if bad is None or before.count + bad.num_rows != before.listed[1]:
        return None
    again = bad.filter(pc.invert(bad["read"])).select(INDEX_SCHEMA.names)
    return Listing({}, bad.filter(bad["read"]), again, kept, parts=before.parts)


def compare_again(listing: Listing, dataset: Dataset) -> tuple[Listing, Dataset]:
    """A listing and its data set as of now: an earlier phase or another job may have read the new images meanwhile."""
    latest = latest_version(dataset)
    if latest is None:
        return listing, dataset
    if listing.new.num_rows:
        listing = _merged(listing, _compare(listing.new, latest.dataset), listing.unopened)
    if listing.unopened and latest.dataset.classes == dataset.classes:
        listing = _opened(listing, latest.dataset)
    parts = {part.id: part for part in (*listing.parts, *dataset.parts, *latest.dataset.parts)}
    listing = replace(listing, parts=tuple(parts.values()))
    return listing, make_dataset(dataset, listing.parts, listing.known, listing.bad, listing.kept)


def _opened(listing: Listing, latest: Dataset) -> Listing:
    """A listing without the unopened archives that a version knows by now."""
    versions = dict(latest.files)
    known = {archive.path for archive in listing.unopened if versions.get(archive.path) == archive.version}
    found = _in_files(known, latest) if known else None
    if found is None:
        return listing
    left = tuple(archive for archive in listing.unopened if archive.path not in known)
    return _merged(listing, replace(found, new=pa.concat_tables([listing.new, found.new])), left)


def _merged(listing: Listing, found: Listing, unopened: tuple[Entry, ...]) -> Listing:
    """What is known of a listing and what has been found of it; `found.new` and `unopened` are left to be read."""
    known, kept = dict(listing.known), dict(listing.kept)
    for part in (*found.known, *found.kept):
        if part in known or part in kept or part in found.known:
            known[part] = pa.concat_tables([listing.samples(part), found.samples(part)])
            kept.pop(part, None)
        else:
            kept[part] = found.kept[part]
    bad, damaged = pa.concat_tables([listing.bad, found.bad]), tuple({*listing.damaged, *found.damaged})
    changed = {"new": found.new, "unopened": unopened, "expected": listing.expected if unopened else None}
    return replace(listing, known=known, kept=kept, bad=bad, damaged=damaged, **changed)


def _compare(index: pa.Table, before: Dataset | None) -> Listing:
    """The rows of an index that a version knows, and those that are new."""
    if before is None:
        return Listing({}, BAD_SCHEMA.empty_table(), index)
    places, is_new = Places(index), np.ones(index.num_rows, bool)
    names = ["sample_id", "label"]
    known, kept, damaged = {}, {}, []
    for number, chosen in enumerate(before.selections):
        table = _readable(partial(before.samples, number, [*PLACE, *names]))
        if table is None:
            damaged.append(chosen.file)
            continue
        at, rows = places.find(table)
        is_new[at] = False
        if len(at) == chosen.samples and places.equal(at, table.select(names)).all():
            kept[chosen.part] = (chosen, before)
        elif len(at):
            images = before.samples(number, ["key", "row"]).take(pa.array(rows))
            known[chosen.part] = _side_by_side(places.rows(at), images, SAMPLE_SCHEMA)
    bad = _readable(before.bad_samples)
    if bad is None:
        damaged.append(before.bad)
        bad = BAD_SCHEMA.empty_table()
    bad = bad.filter(bad["read"])
    at, rows = places.find(bad)
    at, rows = at[is_new[at]], rows[is_new[at]]
    is_new[at] = False
    reasons = bad.select(["reason", "read"]).take(pa.array(rows))
    found_bad = _side_by_side(places.rows(at), reasons, BAD_SCHEMA)
    new = index if is_new.all() else index.filter(pa.array(is_new))
    return Listing(known, found_bad, new, kept, parts=before.parts, damaged=tuple(damaged))


def _side_by_side(rows: pa.Table, other: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of an index with the columns of another table."""
    for name in other.column_names:
        rows = rows.append_column(name, other[name])
    return rows.replace_schema_metadata().select(schema.names).cast(schema)


def _compare_archives(source: Source, archives: Mapping[str, Entry], before: Dataset | None) -> Listing:
    """The samples in archives that a version of other classes knows, which are indexed anew; the others are unopened."""
    versions = dict(before.files) if before else {}
    known = [entry.path for entry in archives.values() if versions.get(entry.path) == entry.version]
    unopened = tuple(entry for entry in archives.values() if versions.get(entry.path) != entry.version)
    index = source.only(known).index() if known else INDEX_SCHEMA.empty_table()
    return replace(_compare(index.replace_schema_metadata(), before), unopened=unopened, notes=tuple(notes_of(index)))


def _compare_files(source: Source, files: Mapping[str, int], before: Dataset, archives: Mapping[str, Entry]) -> Listing:
    """The samples in files that a version knows; the others as rows, or as unopened `archives`."""
    known_files = {uri for uri, version in before.files if files.get(uri) == version}
    found = _in_files(known_files, before)
    if found is None:
        return _compare(source.index(), before)
    others, new = [uri for uri in files if uri not in known_files], INDEX_SCHEMA.empty_table()
    notes: tuple[str, ...] = ()
    if others and not archives:
        with contextlib.suppress(NoImagesError):  # the others have some
            new = source.only(others).index()
        notes = tuple(notes_of(new))
    unopened = tuple(archives[uri] for uri in others) if archives else ()
    new = pa.concat_tables([new.replace_schema_metadata(), found.new])
    return replace(found, new=new, notes=notes, parts=before.parts, unopened=unopened)


def _in_files(files: Set[str], before: Dataset) -> Listing | None:
    """The samples of a version in some of its files, those that could not be read then as new; None if a file is damaged."""
    kept, known, uris = {}, {}, pa.array(sorted(files), pa.string())
    if not {*before.sample_files} <= before.store.files().keys():
        return None
    for number, chosen in enumerate(before.selections):
        mine = {before.files[file][0] for file in chosen.files}
        if mine <= files:
            kept[chosen.part] = (chosen, before)
        elif mine & files:
            table = _readable(partial(before.samples, number))
            if table is None:
                return None
            known[chosen.part] = table.filter(pc.is_in(table["uri"], uris))
    bad = _readable(before.bad_samples)
    if bad is None:
        return None
    bad = bad.filter(pc.is_in(bad["uri"], uris))
    again = bad.filter(pc.invert(bad["read"])).select(INDEX_SCHEMA.names)
    return Listing(known, bad.filter(bad["read"]), again, kept)


def _readable(read: Callable[[], pa.Table]) -> pa.Table | None:
    """The samples of a file, or None, with a warning, if it is missing or damaged."""
    try:
        return read()
    except DamagedError as error:
        log.warning("%s; the images that it lists are read again", str(error).rpartition(": ")[0])
        return None


def latest_version(empty: Dataset) -> Version | None:
    """The latest version of a data set, of the same location if one of the last ones has it; None if there is none."""
    latest = None
    for version in islice(read_versions(empty.cache, empty.name, empty.policy, empty.snapshot), VERSIONS):
        if version.dataset.location == empty.location:
            return version
        latest = latest or version
    return latest
