"""Passes over a dataset in stored order, for evaluation: images without features, or features without images."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, ShardRecord, evenly_spaced, fixed_width, row_groups
from pipeline.cache.layout.view_rows import views_of
from pipeline.cache.read.reader import STUDENT_INTERPOLATION, Batch
from pipeline.cache.read.shard_reader import NO_LABEL, FeatureReader, ShardReader, labels_of
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, decoder_count
from pipeline.runtime.prefetch import map_ahead

GROUPS_AHEAD = 4
"""Row groups whose images are decoded ahead of use."""


def scan_images(
    dataset: Dataset, image_size: int, batch_size: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Images and labels without features, in stored order.

    Args:
        image_size: side of the square images in pixels.
        batch_size: images per batch; a batch does not span row groups and may be smaller.
        limit: approximate number of images, from evenly spaced row groups; None: all images.
        rank, world: read every `world`-th of these row groups, from number `rank` on.
    """
    reader = ShardReader(dataset, dataset.images, "images")
    groups = _groups(reader.records, limit)[rank::world]
    with (
        closing(DecoderPool(decoder_count(), processes=torch.cuda.is_available())) as decoders,
        ThreadPoolExecutor(GROUPS_AHEAD) as pool,
    ):

        def decode(group: RowGroup) -> tuple[pa.Table, Tensor]:
            table = reader.read(group)
            pixels = decoders.arrays.empty(group.rows, 3, image_size, image_size)
            targets = decoders.arrays.row_targets(pixels)
            crops = [[CropTask(v, STUDENT_INTERPOLATION, t)] for v, t in zip(views_of(table), targets, strict=True)]
            decoders.decode(list(zip(table["image"].to_pylist(), crops, strict=True)))
            return table, torch.from_numpy(pixels)

        for table, images in map_ahead(pool, decode, groups, GROUPS_AHEAD):
            for first in range(0, len(images), batch_size):
                part = table.slice(first, batch_size)
                labels = torch.from_numpy(labels_of(part).copy())
                yield Batch(part["sample_id"].to_pylist(), images[first : first + batch_size], labels, {})


def has_labels(dataset: Dataset) -> bool:
    """Whether any image in the first row group of a dataset has a label."""
    images = ShardReader(dataset, dataset.images, "images")
    labels = labels_of(images.read(_groups(images.records)[0], ["label"]))
    return bool((labels != NO_LABEL).any())


def read_summaries(
    dataset: Dataset, teacher: CachedTeacher, limit: int | None = None, shards: Collection[int] | None = None
) -> tuple[Tensor, Tensor]:
    """One cached vector per image: the summary, or the mean of the patches if the teacher has no summary.

    Returns vectors [N, D] float32 of each image's first view, and labels [N] int64, in the order of :func:`scan_images`
    with the same `limit`. `shards` are the numbers of the shards to read, by default all.

    Raises:
        UserError: if shards are missing, or a shard does not hold the keys of its images.
    """
    image_reader, reader = ShardReader(dataset, dataset.images, "images"), FeatureReader(dataset, teacher)
    chosen = {shard: record for shard, record in image_reader.records.items() if shards is None or shard in shards}
    views, kind = dataset.policy.rows_per_image, "summary" if "summary" in teacher.shapes else "patches"
    vectors, labels = [], []
    for group in _groups(chosen, limit):
        images = image_reader.read(group, ["sample_id", "label"])
        table = reader.read(group, ["sample_id", kind])
        expected, found = images["sample_id"].to_pylist(), table["sample_id"].to_pylist()[::views]
        if found != expected:
            raise reader.key_error(group, expected, found)
        values = reader.codecs[kind].decode(torch.from_numpy(fixed_width(table[kind])[::views].copy()))
        vectors.append(values if kind == "summary" else values.mean(dim=(1, 2)))
        labels.append(torch.from_numpy(labels_of(images).copy()))
    return torch.cat(vectors), torch.cat(labels)


class PatchReader:
    """Reads a teacher's patches by row group, without the images; UserError if shards of either are missing.

    `sizes` are the rows of every row group.
    """

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        self._reader = FeatureReader(dataset, teacher)
        images = ShardReader(dataset, dataset.images, "images")
        self._groups = row_groups(images.records.values(), dataset.policy.rows_per_image)
        self.sizes = [group.rows for group in self._groups]

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> tuple[list[str], Tensor]:
        """The sample ids of a row group and their patches [n, h, w, D] float32."""
        table = self._reader.read(self._groups[number], ["sample_id", "patches"])
        patches = self._reader.codecs["patches"].decode(torch.from_numpy(fixed_width(table["patches"]).copy()))
        return table["sample_id"].to_pylist(), patches


def _groups(records: dict[int, ShardRecord], limit: int | None = None) -> list[RowGroup]:
    """The row groups of these shards of images, or about `limit` images' worth of them, evenly spaced."""
    groups = row_groups(records.values())
    return groups if limit is None else evenly_spaced(groups, max(1, limit // ROW_GROUP_SIZE))
