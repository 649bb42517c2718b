"""Passes over a dataset in stored order, for evaluation: images without features, or features without images."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import compress

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, evenly_spaced, fixed_width
from pipeline.cache.layout.shares import with_features
from pipeline.cache.layout.view_rows import views_of
from pipeline.cache.read.reader import STUDENT_INTERPOLATION, Batch
from pipeline.cache.read.shard_reader import FeatureReader, SampleReader, Samples, image_reader
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
    samples, reader = SampleReader(dataset), image_reader(dataset)
    groups = _groups(dataset, limit)[rank::world]
    with (
        closing(DecoderPool(decoder_count(), processes=torch.cuda.is_available())) as decoders,
        ThreadPoolExecutor(GROUPS_AHEAD) as pool,
    ):

        def decode(group: RowGroup) -> tuple[Samples, Tensor]:
            found = samples.read(group)
            table = reader.read(group).take(pa.array(found.rows))
            pixels = decoders.arrays.empty(len(found.rows), 3, image_size, image_size)
            targets = decoders.arrays.row_targets(pixels)
            crops = [[CropTask(v, STUDENT_INTERPOLATION, t)] for v, t in zip(views_of(table), targets, strict=True)]
            decoders.decode(list(zip(table["image"].to_pylist(), crops, strict=True)))
            return found, torch.from_numpy(pixels)

        for found, images in map_ahead(pool, decode, groups, GROUPS_AHEAD):
            for first in range(0, len(images), batch_size):
                part = slice(first, first + batch_size)
                yield Batch(found.names[part], images[part], torch.from_numpy(found.labels[part].copy()), {})


def read_summaries(
    dataset: Dataset, teacher: CachedTeacher, limit: int | None = None, shards: Collection[int] | None = None
) -> tuple[Tensor, Tensor]:
    """One cached vector per sample that has one: the summary, or the mean of the patches if the teacher has no summary.

    Returns vectors [N, D] float32 of each image's first view, and labels [N] int64, in the order of :func:`scan_images`
    with the same `limit`. `shards` are numbers in the list of the shards of all parts, by default all.

    Raises:
        UserError: if shards are missing, or a shard does not hold the keys of its images.
    """
    samples, images, reader = SampleReader(dataset), image_reader(dataset), FeatureReader(dataset, teacher)
    places = {(part.id, shard): number for number, (part, shard) in enumerate(dataset.shards)}
    views, kind = dataset.policy.rows_per_image, "summary" if "summary" in teacher.shapes else "patches"
    vectors, labels = [torch.empty(0, teacher.shapes[kind][-1])], [torch.empty(0, dtype=torch.int64)]
    for group in _groups(dataset, limit):
        if shards is not None and places[dataset.parts[group.part].id, group.shard] not in shards:
            continue
        expected, table = images.read(group, ["key"])["key"].to_pylist(), reader.read(group, ["key", kind])
        if (found := table["key"].to_pylist()[::views]) != expected:
            raise reader.key_error(group, [key.hex() for key in expected], [key.hex() for key in found])
        chosen = samples.read(group)
        present = with_features(table[kind])[::views][chosen.rows]
        values = reader.codecs[kind].decode(torch.from_numpy(fixed_width(table[kind])[::views][chosen.rows[present]]))
        vectors.append(values if kind == "summary" else values.mean(dim=(1, 2)))
        labels.append(torch.from_numpy(chosen.labels[present]))
    return torch.cat(vectors), torch.cat(labels)


def sample_names(dataset: Dataset) -> list[str]:
    """The names of all samples, in the order of :func:`read_summaries`."""
    samples = SampleReader(dataset)
    return [name for group in _groups(dataset) for name in samples.read(group).names]


class PatchReader:
    """Reads a teacher's patches by row group, without the images; UserError if shards of either are missing.

    `sizes` are the rows of every row group.
    """

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        self._reader, self._samples = FeatureReader(dataset, teacher), SampleReader(dataset)
        image_reader(dataset)
        self._groups, self._views = _groups(dataset), dataset.policy.rows_per_image
        self.sizes = [group.rows for group in self._groups]

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> tuple[list[str], Tensor]:
        """The sample ids of a row group, those that have features, and their patches [n, h, w, D] float32."""
        group, views = self._groups[number], self._views
        chosen, table = self._samples.read(group), self._reader.read(group, ["patches"])
        rows = (chosen.rows[:, None] * views + range(views)).reshape(-1)
        present = with_features(table["patches"])[rows]
        patches = self._reader.codecs["patches"].decode(torch.from_numpy(fixed_width(table["patches"])[rows[present]]))
        names = (name for name in chosen.names for _ in range(views))
        return [*compress(names, present)], patches


def _groups(dataset: Dataset, limit: int | None = None) -> list[RowGroup]:
    """The row groups of a data set, or about `limit` images' worth of them, evenly spaced."""
    groups = [RowGroup(*group) for group in dataset.row_groups().tolist()]
    return groups if limit is None else evenly_spaced(groups, max(1, limit // ROW_GROUP_SIZE))
