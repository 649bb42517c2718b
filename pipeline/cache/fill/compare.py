"""Compare the images of a source with those in the cache: names, sizes and labels do not tell a replaced image.

The index in the cache keeps the place and the version (modification time and size) of the file of every image. Where both are as
the source gives them now, the images count as the same. Otherwise, as after a copy, the cached bytes decide: the features stay
if the images are the same, whatever their files' times.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.layout.dataset import Dataset, changed_rows
from pipeline.errors import UserError, one_line
from pipeline.imaging.decode import decode_pixels
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.progress import Progress
from pipeline.sources.base import Source

BLOCK_BYTES = 64 << 20
"""Bytes of images that are read at once, or one shard: a Parquet row group holds images of many shards."""
THREADS = 4

log = logging.getLogger(__name__)


def refuse_other_images(dataset: Dataset, source: Source, index: pa.Table) -> None:
    """Compare the cached images whose files have another place or version than the cache knows.

    Raises:
        UserError: if an image differs.
    """
    rows = changed_rows(dataset, index)
    cached = dataset.records(dataset.images) if len(rows) else {}
    shards = [shard for shard in np.unique(rows // dataset.shard_size).tolist() if shard in cached]
    if not shards:
        return
    log.info(
        "%s: the files of %d of %d images have another place or modification time than when they were cached: comparing",
        dataset.id,
        len(rows),
        dataset.count,
    )
    differing = differing_images(dataset, source, index, shards)
    if differing:
        names = [name for shard in sorted(differing) for name in differing[shard]]
        raise UserError(
            f"{source.location}: {len(names)} images differ from those that {dataset.store.uri} holds under the same names and "
            f"sizes, first {names[0]}: restore them, set data.name to cache the new version under its own name, or run "
            "jobs/precompute.py with this recipe and --verify --repair to compute their shards again"
        )


def differing_images(
    dataset: Dataset, source: Source, index: pa.Table, shards: Sequence[int]
) -> Mapping[int, list[str]]:
    """Ids of the images of these shards that differ between source and cache, by shard; equal pixels are no difference.

    An image that the cache could not read, and the source gives now, differs. Shards that are missing or broken are passed
    over.
    """
    blocks = list(_blocks(dataset, index, shards))
    found: dict[int, list[str]] = {}

    def compare(block: Sequence[int]) -> dict[int, list[str]]:
        return _compare(dataset, source, index, block)

    total = sum(map(dataset.shard_rows, shards))
    with ThreadPoolExecutor(THREADS) as pool, Progress(total, "img", "compare") as progress:
        for block, differing in zip(blocks, map_ahead(pool, compare, blocks, THREADS), strict=True):
            found |= differing
            progress.update(sum(map(dataset.shard_rows, block)))
    return found


def _blocks(dataset: Dataset, index: pa.Table, shards: Sequence[int]) -> Iterator[list[int]]:
    block: list[int] = []
    size = 0
    for shard in shards:
        block.append(shard)
        size += pc.sum(_rows(dataset, index, shard)["size"]).as_py() or 0
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _rows(dataset: Dataset, index: pa.Table, shard: int) -> pa.Table:
    return index.slice(shard * dataset.shard_size, dataset.shard_rows(shard))


def _compare(dataset: Dataset, source: Source, index: pa.Table, shards: Sequence[int]) -> dict[int, list[str]]:
    rows = [_rows(dataset, index, shard) for shard in shards]
    current = source.read(pa.concat_tables(rows))
    found: dict[int, list[str]] = {}
    for shard, part in zip(shards, rows, strict=True):
        names = part["sample_id"].to_pylist()
        images = [next(current) for _ in names]
        cached = _cached(dataset, shard)
        if cached is None:
            continue
        differing = [name for name, image in zip(names, images, strict=True) if not _same(cached.get(name), image)]
        if differing:
            found[shard] = differing
    return found


def _cached(dataset: Dataset, shard: int) -> dict[str, bytes] | None:
    """The cached images of a shard by sample id, or None if it cannot be read."""
    record = dataset.images.listing(shard)
    try:
        table = None if record is None else dataset.images.read(record, ["sample_id", "image"])
    except UserError as error:
        log.warning("not compared: %s", one_line(error))
        return None
    return table and dict(zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True))


def _same(cached: bytes | None, image: bytes | Exception) -> bool:
    """Whether an image of the source is the cached one; None: the cache could not read it."""
    if isinstance(image, Exception):
        return cached is None
    if cached == image:
        return True
    try:
        pixels = decode_pixels(image)
        return cached is not None and np.array_equal(pixels, decode_pixels(cached))
    except ValueError:
        return cached is None
