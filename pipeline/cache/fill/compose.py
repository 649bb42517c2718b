"""Where new images go: those that a part holds already stay there, the others make new parts.

What a part holds follows from its images alone, so that two jobs that read the same images make the same parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.layout.dataset import SAMPLE_SCHEMA, Dataset
from pipeline.cache.layout.part import PART_SCHEMA, Part, part_id, read_part, write_part

PART_SHARDS = 32
"""Most shards of a part."""


def place_images(
    dataset: Dataset, images: pa.Table, shard_size: int, made: dict[str, Part]
) -> Iterator[tuple[Part, pa.Table]]:
    """Parts with the images that are or will be in them (`SAMPLE_SCHEMA`), for images with keys (`KEYED_SCHEMA`).

    Args:
        dataset: names cache and view; its own parts are preferred.
        made: the parts that this job has made, to which those made here are added.

    Raises:
        UserError: if a part of the cache is damaged.
    """
    own = (replace(part, policy=dataset.policy, snapshot=dataset.snapshot) for part in made.values())
    for part in chain(dataset.parts, own, _other_parts(dataset, made)):
        if not images.num_rows:
            return
        found = images.join(_numbered(part.index()), "key", join_type="inner")
        if found.num_rows:
            yield part, found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
            images = images.filter(pc.invert(pc.is_in(images["key"], found["key"].combine_chunks())))
    for index in _new_parts(dataset, images, shard_size):
        part = Part(dataset.cache, part_id(index), index.num_rows, shard_size, dataset.policy, dataset.snapshot)
        write_part(part, index)
        part = made[part.id] = replace(part, shard_size=_written(part).shard_size)
        found = images.join(_numbered(index), "key", join_type="inner")
        yield part, found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


def _other_parts(dataset: Dataset, made: Mapping[str, Part]) -> Iterator[Part]:
    """The parts of the cache whose images are all there, and that neither the data set has nor this job makes."""
    seen = {*made, *(part.id for part in dataset.parts)}
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


def _new_parts(dataset: Dataset, images: pa.Table, shard_size: int) -> Iterator[pa.Table]:
    """The indices of new parts, in the order of the keys: every row group is then a random sample of the images.

    A tar or Parquet file makes parts of its own, which stay as they are when others come or go.
    """
    numbered = images.append_column("at", pa.array(range(images.num_rows), pa.int64()))
    first = numbered.group_by("key").aggregate([("at", "min")])["at_min"]
    by_file = "uri" if dataset.files else "key"
    unique = images.take(first.combine_chunks()).sort_by([(by_file, "ascending"), ("key", "ascending")])
    index, length = unique.select(PART_SCHEMA.names).cast(PART_SCHEMA), shard_size * PART_SHARDS
    ends = [index.num_rows]
    if dataset.files:
        ends = pc.run_end_encode(unique["uri"].combine_chunks()).run_ends.to_pylist()
    for start, end in pairwise([0, *ends]):
        yield from (index.slice(at, min(length, end - at)) for at in range(start, end, length))
