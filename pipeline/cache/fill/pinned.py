"""A version of a data set by its address in the cache: what a run was made from, however the source has changed since."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pyarrow as pa

from pipeline.cache.fill.listing import Listing
from pipeline.cache.layout.dataset import Dataset, read_versions
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.errors import UserError
from pipeline.imaging.geometry import ViewPolicy
from pipeline.sources.base import INDEX_SCHEMA
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store

SCHEME = "cache://"
"""Begins the address of a version: ``cache://<data set>/<version>``, as `jobs/precompute.py --list` shows it after the scheme."""


@dataclass(frozen=True)
class PinnedImages:
    """The source of a version, which is not read: its images are in the cache."""

    random_access: ClassVar[bool] = True

    name: str
    location: str
    classes: tuple[str, ...]

    def versions(self) -> dict[str, int]:
        """None: nothing is looked for."""
        return {}

    def only(self, files: Sequence[str]) -> "PinnedImages":
        """This source."""
        return self

    def index(self) -> pa.Table:
        """Nothing is new."""
        return INDEX_SCHEMA.empty_table()

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """An exception for every image."""
        yield from (
            FileNotFoundError("a version by its address is not read from its source") for _ in range(rows.num_rows)
        )


def find_version(
    cache: Store, address: str, policy: ViewPolicy, snapshot: RecordSnapshot
) -> tuple[PinnedImages, Listing, Dataset]:
    """The version at ``<data set>/<version>``, of which the first digits suffice.

    Raises:
        UserError: if the cache does not hold it.
    """
    name, _, digits = address.partition("/")
    versions = read_versions(cache, name, policy, snapshot) if name == folder_name(name) else iter(())
    found = next((version for version in versions if digits and version.dataset.fingerprint.startswith(digits)), None)
    if found is None:
        raise UserError(
            f"{SCHEME}{address}: {cache.uri} holds no such version; jobs/precompute.py --list shows those that it holds"
        )
    dataset = replace(found.dataset, policy=policy, snapshot=snapshot)
    kept = {chosen.part: (chosen, dataset) for chosen in dataset.selections}
    listing = Listing({}, dataset.bad_samples(), INDEX_SCHEMA.empty_table(), kept, parts=dataset.parts)
    return PinnedImages(dataset.name, dataset.location, dataset.classes), listing, dataset
