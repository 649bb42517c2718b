"""What a source lists now beside what its data set's latest version knows: only files that are new or have changed are read.

A row is known if place (URI and offset), size and version of its file are those that a version was made of. What a known image
is called and how it is labelled may change.
"""

from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.layout.dataset import BAD_SCHEMA, SAMPLE_SCHEMA, Dataset, Version, read_versions
from pipeline.sources.base import INDEX_SCHEMA

PLACE = ["uri", "offset", "size", "version"]
"""Columns that tell a file, and an image in it, from all others."""
VERSIONS = 8
"""Latest versions among which one of the same location is looked for."""


@dataclass(frozen=True)
class Listing:
    """A source's index, compared with a version.

    Attributes:
        known: rows of `SAMPLE_SCHEMA` by the id of their part.
        bad: rows of `BAD_SCHEMA` that are known.
        new: rows of `INDEX_SCHEMA` that nobody has read.
    """

    known: dict[str, pa.Table]
    bad: pa.Table
    new: pa.Table


def compare_listing(index: pa.Table, dataset: Dataset | None) -> Listing:
    """The rows of an index that a version knows, and those that are new."""
    if dataset is None:
        return Listing({}, BAD_SCHEMA.empty_table(), index)
    left = index.append_column("at", pa.array(range(index.num_rows), pa.int64()))
    known = {}
    for number, chosen in enumerate(dataset.selections):
        found = _joined(left, dataset.samples(number, [*PLACE, "key", "row"]))
        if found.num_rows:
            known[chosen.part] = found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
            left = _without(left, found)
    known_bad = dataset.bad_samples()
    bad = _joined(left, known_bad.filter(known_bad["read"]).select([*PLACE, "reason", "read"]))
    left = _without(left, bad)
    return Listing(known, bad.select(BAD_SCHEMA.names).cast(BAD_SCHEMA), left.select(INDEX_SCHEMA.names))


def _joined(index: pa.Table, known: pa.Table) -> pa.Table:
    return index.join(known, PLACE, join_type="inner").sort_by("at")


def _without(index: pa.Table, found: pa.Table) -> pa.Table:
    return index.filter(pc.invert(pc.is_in(index["at"], found["at"].combine_chunks()))) if found.num_rows else index


def latest_version(empty: Dataset) -> Version | None:
    """The latest version of a data set, of the same location if one of the last ones has it; None if there is none."""
    versions = list(islice(read_versions(empty.cache, empty.name, empty.policy, empty.snapshot), VERSIONS))
    same = (version for version in versions if version.dataset.location == empty.location)
    return next(same, versions[0] if versions else None)
