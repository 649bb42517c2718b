"""What a source lists now beside what its data set's latest version knows: only files that are new or have changed are read.

A row is known if place (URI and offset), size and version of its file are those that a version was made of. What a known image
is called and how it is labelled may change. Tars and Parquet files that are known are not even opened, and the samples of parts
that hold no others are not read.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
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
ROWS_JOINED = 1 << 17
"""Rows that are joined at a time, if their versions differ: a join holds its rows twice."""
MAX_JOINS = 16
"""Pieces of an index, at most."""
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
        part: pa.concat_tables([listing.samples(part), found.samples(part)]) for part in (*found.known, *found.kept)
    }
    kept = {part: item for part, item in listing.kept.items() if part not in known}
    bad = pa.concat_tables([listing.bad, found.bad])
    parts = {part.id: part for part in (*listing.parts, *dataset.parts, *latest.dataset.parts)}
    damaged = tuple({*listing.damaged, *found.damaged})
    listing = Listing(known, bad, found.new, kept, listing.notes, tuple(parts.values()), damaged)
    return listing, make_dataset(dataset, listing.parts, known, bad, kept)


def _compare(index: pa.Table, before: Dataset | None) -> Listing:
    """The rows of an index that a version knows, and those that are new."""
    if before is None:
        return Listing({}, BAD_SCHEMA.empty_table(), index)
    tables, damaged = [_numbered(SAMPLE_SCHEMA.empty_table(), -1)], []
    for number, chosen in enumerate(before.selections):
        table = _readable(partial(before.samples, number))
        if table is None:
            damaged.append(chosen.file)
        else:
            tables.append(_numbered(table, number))
    found = _matches(index, pa.concat_tables(tables))
    del tables
    known, kept, names = {}, {}, index.select(["sample_id", "label"]).combine_chunks()
    for number, at, rows in _by_part(*found):
        chosen = before.selections[number]
        if len(at) == chosen.samples and _named_alike(names, at, before.samples(number, ["sample_id", "label"])):
            kept[chosen.part] = (chosen, before)
        else:
            known[chosen.part] = _side_by_side(index, at, before.samples(number, ["key", "row"]), rows, SAMPLE_SCHEMA)
    left = _without(index, found[0])
    bad = _readable(before.bad_samples)
    if bad is None:
        damaged.append(before.bad)
        bad = BAD_SCHEMA.empty_table()
    bad = bad.filter(bad["read"])
    at, _, rows = _matches(left, _numbered(bad, 0))
    found_bad, new = _side_by_side(left, at, bad.select(["reason", "read"]), rows, BAD_SCHEMA), _without(left, at)
    return Listing(known, found_bad, new, kept, parts=before.parts, damaged=tuple(damaged))


def _numbered(table: pa.Table, part: int) -> pa.Table:
    """The places of a table, with the number of its part and those of its rows."""
    parts, rows = np.full(table.num_rows, part), np.arange(table.num_rows)
    return table.select(PLACE).append_column("part", pa.array(parts)).append_column("row", pa.array(rows))


def _matches(index: pa.Table, known: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of `index` whose places `_numbered` has: their numbers, and the parts and the rows there, int64."""
    rows = _numbered(index, 0).rename_columns([*PLACE, "none", "at"]).drop_columns("none")
    pieces = min(MAX_JOINS, 1 + max(index.num_rows, known.num_rows) // ROWS_JOINED)
    ours, theirs = (table["version"].to_numpy() % pieces for table in (rows, known))
    found = []
    for piece in range(pieces):
        left, right = rows.filter(pa.array(ours == piece)), known.filter(pa.array(theirs == piece))
        found.append(left.join(right, PLACE, join_type="inner").select(["at", "part", "row"]))
    at, parts, numbers = (pa.concat_tables(found)[name].to_numpy() for name in ("at", "part", "row"))
    order = np.argsort(at)
    return at[order], parts[order], numbers[order]


def _by_part(at: np.ndarray, parts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For every part its number, and of its rows, in their order, those of the index and their own."""
    order = np.lexsort((rows, parts))
    ends = np.flatnonzero(np.diff(parts[order], append=-1)) + 1
    for some in np.split(order, ends)[:-1]:
        yield int(parts[some[0]]), at[some], rows[some]


def _named_alike(index: pa.Table, at: np.ndarray, samples: pa.Table) -> bool:
    """Whether samples are called and labelled as these rows of the index."""
    return all(index[name].take(pa.array(at)).equals(samples[name]) for name in samples.column_names)


def _side_by_side(index: pa.Table, at: np.ndarray, other: pa.Table, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Rows of the index with the columns of rows of another table."""
    table, more = index.take(pa.array(at)), other.take(pa.array(rows))
    for name in more.column_names:
        table = table.append_column(name, more[name])
    return table.replace_schema_metadata().select(schema.names).cast(schema)


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


def _without(index: pa.Table, at: np.ndarray) -> pa.Table:
    left = np.ones(index.num_rows, bool)
    left[at] = False
    return index.filter(pa.array(left)) if len(at) else index


def latest_version(empty: Dataset) -> Version | None:
    """The latest version of a data set, of the same location if one of the last ones has it; None if there is none."""
    latest = None
    for version in islice(read_versions(empty.cache, empty.name, empty.policy, empty.snapshot), VERSIONS):
        if version.dataset.location == empty.location:
            return version
        latest = latest or version
    return latest
