"""Where new images go: those that a part holds already stay there, the others make new parts.

What a part holds follows from the images of a wave alone, so that two jobs that read the same images make the same parts.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.fill.digest import KEYED_SCHEMA
from pipeline.cache.fill.listing import Listing
from pipeline.cache.layout.dataset import SAMPLE_SCHEMA, Dataset
from pipeline.cache.layout.part import PART_SCHEMA, Part, part_id, read_part, write_part
from pipeline.runtime.prefetch import map_ahead
from pipeline.storage.files import THREADS

PART_SHARDS = 32
"""Most shards of a part."""

log = logging.getLogger(__name__)


class Placer:
    """Finds the parts that hold images, and makes parts of the others. Images come in waves; the parts stay in memory, no keys.

    Args:
        dataset: names cache and view.
        parts: where images are looked for first, in those of their shards that exist; what is found or made is added.
        made: the parts that this job has made, to which those made here are added.
    """

    def __init__(self, dataset: Dataset, parts: dict[str, Part], shard_size: int, made: dict[str, Part]) -> None:
        self.dataset, self.parts, self.shard_size, self.made = dataset, parts, shard_size, made
        self._others: list[Part] | None = None

    def place(self, images: pa.Table, scatter: bool) -> Iterator[tuple[Part, pa.Table]]:
        """Parts with the images that are or will be in them (`SAMPLE_SCHEMA`), for images with keys (`KEYED_SCHEMA`).

        Args:
            scatter: whether the images of a new part are ordered by key, not as the source stores them.

        Raises:
            UserError: if a part of the cache is damaged.
        """
        if not images.num_rows:
            return
        wanted = np.sort(_heads(images["key"]))
        with ThreadPoolExecutor(THREADS) as pool:
            for part, index in map_ahead(pool, lambda part: (part, part.index()), self._candidates(), THREADS):
                rows = _joined(images, index) if _meet(wanted, index) else None
                if rows is not None and part.id not in self.made:
                    rows = rows.filter(pc.invert(_in_shards(part, rows, part.missing(part.images))))
                if rows is not None and rows.num_rows:
                    self.parts[part.id] = part
                    yield part, rows
                    images = images.filter(pc.invert(pc.is_in(images["key"], rows["key"].combine_chunks())))
                if not images.num_rows:
                    return
        for index in _new_parts(self.dataset, images, self.shard_size, scatter):
            part = self._made(index)
            self.parts[part.id] = part
            yield part, _joined(images, index)

    def _candidates(self) -> Iterator[Part]:
        """The parts that may hold an image already, those of the data set first."""
        first = [*self.parts.values()]
        own = [part for part in self.made.values() if part.id not in self.parts]
        for part in chain(first, map(self._seen, own)):
            if part.id in self.made or len(part.missing(part.images)) < part.shards:
                yield part
        done = {*self.parts, *self.made}
        if self._others is None:
            names = self.dataset.cache.sub("parts").folders()
            found = (read_part(self.dataset.cache, name) for name in names if name not in done)
            self._others = [self._seen(part) for part in found if part is not None]
        for part in self._others:
            if part.id not in done and not part.missing(part.images):
                yield part

    def _seen(self, part: Part) -> Part:
        """A part through the view of the data set."""
        return replace(part, policy=self.dataset.policy, snapshot=self.dataset.snapshot)

    def _made(self, index: pa.Table) -> Part:
        part = self._seen(Part(self.dataset.cache, part_id(index), index.num_rows, self.shard_size))
        write_part(part, index)
        part = self.made[part.id] = replace(part, shard_size=_written(part).shard_size)
        return part


def _heads(keys: pa.ChunkedArray) -> np.ndarray:
    """The first 64 bits of keys: two images that share them by chance cost a look, and nothing more."""
    chunks = [chunk for chunk in keys.chunks if len(chunk)]
    arrays = [np.frombuffer(c.buffers()[1], np.uint64)[2 * c.offset : 2 * (c.offset + len(c)) : 2] for c in chunks]
    return np.concatenate([np.empty(0, np.uint64), *arrays])


def _meet(wanted: np.ndarray, index: pa.Table) -> bool:
    """Whether a part may hold one of the images with these sorted heads of keys."""
    heads = _heads(index["key"])
    places = np.minimum(np.searchsorted(wanted, heads), len(wanted) - 1)
    return bool((wanted[places] == heads).any())


def _joined(images: pa.Table, index: pa.Table) -> pa.Table:
    """Those of the images that are in the part with this index (`SAMPLE_SCHEMA`)."""
    found = images.join(_numbered(index), "key", join_type="inner")
    return found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


def take_lost(listing: Listing) -> tuple[Listing, pa.Table]:
    """A listing without the samples whose shard of images can no longer be restored, and these samples (`KEYED_SCHEMA`).

    That is so if the shard is missing, and the data set no longer contains one of its images, which nobody provides then.
    """
    known, kept, taken = dict(listing.known), dict(listing.kept), [KEYED_SCHEMA.empty_table()]
    for part in listing.parts:
        if part.missing(part.images) and (lost := _lost_shards(part, samples := listing.samples(part.id))):
            log.warning("%s lacks images that the data set no longer contains: others of it move", part.store.uri)
            moved = _in_shards(part, samples, lost)
            taken.append(samples.filter(moved).select(KEYED_SCHEMA.names))
            known[part.id] = samples.filter(pc.invert(moved))
            kept.pop(part.id, None)
    known = {name: samples for name, samples in known.items() if samples.num_rows}
    return replace(listing, known=known, kept=kept), pa.concat_tables(taken)


def _lost_shards(part: Part, samples: pa.Table) -> list[int]:
    counts = {shard: part.shard_rows(shard) for shard in part.missing(part.images)}
    lost = [shard for shard, count in counts.items() if _distinct(samples, part, shard) < count]
    if lost and len(counts) == part.shards and not part.store.exists("index.parquet"):
        lost = [*counts]
    return lost


def _distinct(samples: pa.Table, part: Part, shard: int) -> int:
    return len(pc.unique(samples.filter(_in_shards(part, samples, [shard]))["row"]))


def _in_shards(part: Part, samples: pa.Table, shards: Sequence[int]) -> pa.ChunkedArray:
    """Which samples are in these shards of a part."""
    return pc.is_in(pc.divide(samples["row"], part.shard_size), pa.array(shards, pa.int64()))


def _written(part: Part) -> Part:
    """The part as the cache describes it: another job may have made it, with shards of another size."""
    written = read_part(part.cache, part.id)
    assert written is not None
    return written


def _numbered(index: pa.Table) -> pa.Table:
    """Keys and rows of a part."""
    return index.select(["key"]).append_column("row", pa.array(range(index.num_rows), pa.int64()))


def _new_parts(dataset: Dataset, images: pa.Table, shard_size: int, scatter: bool) -> Iterator[pa.Table]:
    """The indices of new parts. In the order of the keys every row group is a random sample of the images.

    A tar or Parquet file makes parts of its own, which stay as they are when others come or go.
    """
    numbered = images.append_column("at", pa.array(range(images.num_rows), pa.int64()))
    first = numbered.group_by("key").aggregate([("at", "min")])["at_min"]
    by_file, order = "uri" if dataset.files else "key", "key" if scatter else "offset"
    unique = images.take(first.combine_chunks()).sort_by([(by_file, "ascending"), (order, "ascending")])
    index, length = unique.select(PART_SCHEMA.names).cast(PART_SCHEMA), shard_size * PART_SHARDS
    ends = [index.num_rows]
    if dataset.files:
        ends = pc.run_end_encode(unique["uri"].combine_chunks()).run_ends.to_pylist()
    for start, end in pairwise([0, *ends]):
        yield from (index.slice(at, min(length, end - at)) for at in range(start, end, length))
