"""What a source lists now beside what its data set's latest version knows: only files that are new or have changed are read.

A row is known if place (URI and offset), size and version of its file are those that a version was made of. What a known image
is called and how it is labelled may change. Tars and Parquet files that are known are not even opened, and the samples of parts
that hold no others are not read.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

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
from pipeline.sources.left_out import notes_of
from pipeline.storage.store import DamagedError

PLACE = ["uri", "offset", "size", "version"]
"""Columns that tell a file, and an image in it, from all others."""
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
    """

    known: dict[str, pa.Table]
    bad: pa.Table
    new: pa.Table
    kept: dict[str, tuple[Selection, Dataset]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    damaged: tuple[str, ...] = ()

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
    files = source.versions()
    empty = replace(empty, files=tuple(sorted(files.items())))
    latest = latest_version(empty)
    before = latest.dataset if latest else None
    if before and files and before.classes == empty.classes:
        listing = _compare_files(source, files, before)
    else:
        index = source.index()
        listing = replace(_compare(index, before), notes=tuple(notes_of(index)))
    return listing, make_dataset(empty, listing.parts, listing.known, listing.bad, listing.kept)


def compare_again(listing: Listing, dataset: Dataset) -> tuple[Listing, Dataset]:
    """A listing and its data set as of now: an earlier phase or another job may have read the new images meanwhile."""
    latest = latest_version(dataset)
    if latest is None:
        return listing, dataset
    found = _compare(listing.new, latest.dataset)
    known = listing.known | {
        part: pa.concat_tables([listing.samples(part), rows]) for part, rows in found.known.items()
    }
    kept = {part: item for part, item in listing.kept.items() if part not in found.known}
    bad = pa.concat_tables([listing.bad, found.bad])
    parts = {part.id: part for part in (*listing.parts, *dataset.parts, *latest.dataset.parts)}
    damaged = tuple({*listing.damaged, *found.damaged})
    listing = Listing(known, bad, found.new, kept, listing.notes, tuple(parts.values()), damaged)
    return listing, make_dataset(dataset, listing.parts, known, bad, kept)


def _compare(index: pa.Table, before: Dataset | None) -> Listing:
    """The rows of an index that a version knows, and those that are new."""
    if before is None:
        return Listing({}, BAD_SCHEMA.empty_table(), index)
    index = index.append_column("at", pa.array(range(index.num_rows), pa.int64()))
    schema = pa.schema([*map(SAMPLE_SCHEMA.field, (*PLACE, "key", "row")), pa.field("part", pa.int64())])
    tables, damaged = [schema.empty_table()], []
    for number, chosen in enumerate(before.selections):
        table = _readable(partial(before.samples, number))
        if table is None:
            damaged.append(chosen.file)
        else:
            part = pa.repeat(pa.scalar(number, pa.int64()), table.num_rows)
            tables.append(table.select([*PLACE, "key", "row"]).append_column("part", part).cast(schema))
    found = _joined(index, pa.concat_tables(tables))
    left = _without(index, found)
    known = {}
    for number in pc.unique(found["part"]).to_pylist():
        rows = found.filter(pc.equal(found["part"], number))
        known[before.selections[number].part] = rows.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
    known_bad = _readable(before.bad_samples)
    if known_bad is None:
        damaged.append(before.bad)
        known_bad = BAD_SCHEMA.empty_table()
    bad = _joined(left, known_bad.filter(known_bad["read"]).select([*PLACE, "reason", "read"]))
    left = _without(left, bad)
    found_bad, new = bad.select(BAD_SCHEMA.names).cast(BAD_SCHEMA), left.select(INDEX_SCHEMA.names)
    return Listing(known, found_bad, new, parts=before.parts, damaged=tuple(damaged))


def _compare_files(source: Source, files: Mapping[str, int], before: Dataset) -> Listing:
    """The samples in files that a version knows, and the rows of the others."""
    known_files = {uri for uri, version in before.files if files.get(uri) == version}
    kept, known, present = {}, {}, before.store.files()
    if not {*before.sample_files} <= present.keys():
        return _compare(source.index(), before)
    for number, chosen in enumerate(before.selections):
        uris = {before.files[file][0] for file in chosen.files}
        if uris <= known_files:
            kept[chosen.part] = (chosen, before)
        elif uris & known_files:
            table = _readable(partial(before.samples, number))
            if table is None:
                return _compare(source.index(), before)
            known[chosen.part] = table.filter(pc.is_in(table["uri"], pa.array(sorted(known_files), pa.string())))
    bad = _readable(before.bad_samples)
    if bad is None:
        return _compare(source.index(), before)
    bad = bad.filter(pc.is_in(bad["uri"], pa.array(sorted(known_files), pa.string())))
    others, new = [uri for uri in files if uri not in known_files], INDEX_SCHEMA.empty_table()
    notes: tuple[str, ...] = ()
    if others:
        with contextlib.suppress(NoImagesError):  # the others have some
            new = source.only(others).index()
        notes = tuple(notes_of(new))
    again = bad.filter(pc.invert(bad["read"])).select(INDEX_SCHEMA.names)
    new = pa.concat_tables([new.replace_schema_metadata(), again])
    return Listing(known, bad.filter(bad["read"]), new, kept, notes, before.parts)


def _readable(read: Callable[[], pa.Table]) -> pa.Table | None:
    """The samples of a file, or None, with a warning, if it is missing or damaged."""
    try:
        return read()
    except DamagedError as error:
        log.warning("%s; the images that it lists are read again", str(error).rpartition(": ")[0])
        return None


def _joined(index: pa.Table, known: pa.Table) -> pa.Table:
    return index.join(known, PLACE, join_type="inner").sort_by("at")


def _without(index: pa.Table, found: pa.Table) -> pa.Table:
    return index.filter(pc.invert(pc.is_in(index["at"], found["at"].combine_chunks()))) if found.num_rows else index


def latest_version(empty: Dataset) -> Version | None:
    """The latest version of a data set, of the same location if one of the last ones has it; None if there is none."""
    versions = list(islice(read_versions(empty.cache, empty.name, empty.policy, empty.snapshot), VERSIONS))
    same = (version for version in versions if version.dataset.location == empty.location)
    return next(same, versions[0] if versions else None)
