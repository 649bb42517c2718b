"""Where new images go: those that a part holds already stay there, the others make new parts.

What a part holds follows from its images alone, so that two jobs that read the same images make the same parts.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.fill.digest import KEYED_SCHEMA
from pipeline.cache.fill.listing import Listing
from pipeline.cache.layout.dataset import SAMPLE_SCHEMA, Dataset
from pipeline.cache.layout.part import PART_SCHEMA, Part, part_id, read_part, write_part

PART_SHARDS = 32
"""Most shards of a part."""

log = logging.getLogger(__name__)


def place_images(
    dataset: Dataset, parts: Sequence[Part], images: pa.Table, shard_size: int, made: dict[str, Part], scatter: bool
) -> Iterator[tuple[Part, pa.Table]]:
    """Parts with the images that are or will be in them (`SAMPLE_SCHEMA`), for images with keys (`KEYED_SCHEMA`).

    Args:
        dataset: names cache and view.
        parts: where images are looked for first, in those of their shards that exist.
        made: the parts that this job has made, to which those made here are added.
        scatter: whether the images of a new part are ordered by key, not as the source stores them.

    Raises:
        UserError: if a part of the cache is damaged.
    """
    own = (replace(part, policy=dataset.policy, snapshot=dataset.snapshot) for part in made.values())
    for part in chain(parts, own, _other_parts(dataset, {*made, *(part.id for part in parts)})):
        if not images.num_rows:
            return
        lacking = [] if part.id in made else part.missing(part.images)
        if len(lacking) == part.shards:
            continue
        found = images.join(_numbered(part.index()), "key", join_type="inner")
        found = found.filter(pc.invert(_in_shards(part, found, lacking)))
        if found.num_rows:
            yield part, found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
            images = images.filter(pc.invert(pc.is_in(images["key"], found["key"].combine_chunks())))
    for index in _new_parts(dataset, images, shard_size, scatter):
        part = Part(dataset.cache, part_id(index), index.num_rows, shard_size, dataset.policy, dataset.snapshot)
        write_part(part, index)
        part = made[part.id] = replace(part, shard_size=_written(part).shard_size)
        found = images.join(_numbered(index), "key", join_type="inner")
        yield part, found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


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


def _other_parts(dataset: Dataset, seen: Collection[str]) -> Iterator[Part]:
    """The parts of the cache whose images are all there, without those with these ids."""
    for name in dataset.cache.sub("parts").folders():
        part = None if name in seen else read_part(dataset.cache, name)
        if part is not None:
            part = replace(part, policy=dataset.policy, snapshot=dataset.snapshot)
            if not part.missing(part.images):
                yield part


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
