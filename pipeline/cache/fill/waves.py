"""New images in waves, each given its places, and stored, before the next is read; archives of a store are staged between.

So the cache needs room for the images of one wave beside those that it keeps, and the driver memory for their names.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.fill.draft import WAVE_IMAGES
from pipeline.cache.fill.ingest import ingest_row
from pipeline.cache.fill.plan import SplitPlan
from pipeline.cache.fill.staging import PLACES_SCHEMA, Staged, Staging
from pipeline.cache.layout.part import Part
from pipeline.errors import UserError
from pipeline.sources.streamed import StreamedSource
from pipeline.storage.files import Entry
from pipeline.storage.store import Store

WAVE_BYTES = 64 << 30
"""Bytes of the archives of a wave: enough of them for the CPUs of a cluster, and little beside what a cache holds of as many."""


def new_waves(split: SplitPlan) -> Iterator[pa.Table]:
    """The new rows of a split, about `WAVE_IMAGES` at a time.

    Files of many images are not divided, for they make parts of their own. Images that are files of their own are taken from all
    over the listing, so that a part mixes their classes.
    """
    numbers = _wave_numbers(split.new, bool(split.dataset.files))
    for number in range(int(numbers.max(initial=0)) + 1):
        yield split.new.filter(pa.array(numbers == number))


def _wave_numbers(new: pa.Table, by_file: bool) -> np.ndarray:
    """The wave of each row of an index."""
    if not by_file:
        return np.arange(new.num_rows, dtype=np.int32) % max(1, -(-new.num_rows // WAVE_IMAGES))
    files = new["uri"].dictionary_encode().combine_chunks().indices.to_numpy()
    wave, size, numbers = 0, 0, list[int]()
    for count in np.bincount(files).tolist():
        if size and size + count > WAVE_IMAGES:
            wave, size = wave + 1, 0
        numbers.append(wave)
        size += count
    return np.array(numbers, np.int32)[files]


def waves(archives: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The archives in order, as many at a time as `WAVE_BYTES` allow."""
    wave, size = list[Entry](), 0
    for archive in archives:
        if wave and size + archive.size > WAVE_BYTES:
            yield wave
            wave, size = [], 0
        wave.append(archive)
        size += archive.size
    if wave:
        yield wave


def staging_bytes(archives: Sequence[Entry]) -> int:
    """Upper bound of the bytes that are staged at a time."""
    return max((sum(entry.size for entry in wave) for wave in waves(archives)), default=0)


def read_wave(cache: Store, wave: Sequence[Entry], source: StreamedSource) -> Iterator[list[tuple[Staging, Staged]]]:
    """What is staged of archives of a source, in groups of about `WAVE_IMAGES` samples; none is divided.

    An archive that another job with the same archives has finished with, and removed, is staged again.

    Raises:
        UserError: if that is so again.
    """
    group, count = list[tuple[Staging, Staged]](), 0
    for staging in (Staging(cache, archive, source.identity) for archive in wave):
        staged = staging.read()
        if staged is None:
            staging.write(source)
            staged = staging.read()
        if staged is None:
            raise UserError(f"{staging.store.uri} is removed while the job needs it: run the same command again")
        if group and count + staged.samples.num_rows > WAVE_IMAGES:
            yield group
            group, count = [], 0
        group.append((staging, staged))
        count += staged.samples.num_rows
    if group:
        yield group


def ingest_rows(
    split: str, placed: Sequence[tuple[Part, pa.Table]], staged: pa.Table | None = None
) -> list[dict[str, Any]]:
    """The rows for `Ingest` of the missing shards that these samples make up, whose images may be staged (`STAGED_SCHEMA`)."""
    rows = []
    for part, samples in placed:
        lacking = part.missing(part.images)
        numbers, counts = np.unique(np.unique(samples["row"].to_numpy()) // part.shard_size, return_counts=True)
        held = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        mine = [shard for shard in lacking if held.get(shard) == part.shard_rows(shard)]
        if mine:
            places = None if staged is None else _places(staged, samples)
            rows += [ingest_row(split, part, shard, samples, places) for shard in mine]
    return rows


def _places(staged: pa.Table, samples: pa.Table) -> pa.Table:
    return staged.select(PLACES_SCHEMA.names).filter(pc.is_in(staged["key"], samples["key"].combine_chunks()))


class Names:
    """Finds samples of one name in archives of one file name, which alone can share names."""

    def __init__(self, archives: Sequence[Entry]) -> None:
        counts = Counter(os.path.basename(archive.path) for archive in archives)
        self.shared = {name for name, count in counts.items() if count > 1}
        self.seen: defaultdict[str, list[tuple[str, pa.Table]]] = defaultdict(list)

    def check(self, archive: Entry, samples: pa.Table) -> None:
        """Raise UserError if an earlier archive has a sample of the same name."""
        name = os.path.basename(archive.path)
        if name not in self.shared:
            return
        ids = samples.select(["sample_id"])
        for path, known in self.seen[name]:
            both = ids.join(known, "sample_id", join_type="inner")
            if both.num_rows:
                raise UserError(
                    f"sample id '{both['sample_id'][0]}' occurs more than once (in {path} and {archive.path}); rename or "
                    "remove one of them"
                )
        self.seen[name].append((archive.path, ids))
