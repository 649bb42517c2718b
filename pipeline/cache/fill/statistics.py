"""Statistics of a teacher's features over a data set: merged exactly from those of its shards, by which training standardises."""

from collections.abc import Iterator, Mapping

import pyarrow as pa
import torch

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.part_stats import STATISTICS, PartStats, dump_part_stats
from pipeline.cache.layout.shards import ShardRecord, fixed_width
from pipeline.cache.layout.shares import NONE_ASKED, with_features
from pipeline.cache.layout.stats import Moments, MomentSums, dump_moments, merge_all
from pipeline.errors import UserError


def freeze_stats(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Merge the statistics of all shards of a complete teacher, unless that was done.

    Where a data set has only some images of a part, its features are decoded and summed.
    """
    store = dataset.statistics(teacher.id)
    if not store.exists("stats.npz"):
        for part in dataset.parts:  # an earlier job may have been killed before it did that
            part.merge_statistics(part.teacher(teacher.id))
        found = [*dataset_moments(dataset, teacher)]
        if not found:
            reason = NONE_ASKED.format(share=teacher.share)
            raise UserError(f"{dataset.location}: teacher {teacher.spec.name}: {reason}")
        store.put("stats.npz", dump_moments(merge_all(found)))


def dataset_moments(dataset: Dataset, teacher: CachedTeacher) -> Iterator[Mapping[str, Moments]]:
    """Statistics of the samples, of whole parts or shard by shard, in order; UserError if one is missing or damaged."""
    codecs: dict[str, FeatureCodec] = {}
    for number, chosen in enumerate(dataset.selections):
        records = needed_records(dataset, number, teacher)
        if chosen.whole:
            yield from dataset.parts[number].teacher(teacher.id).moments(records)
            continue
        codecs = codecs or load_codecs(dataset.cache, teacher)
        for record in records:
            sums = {kind: MomentSums() for kind in codecs}
            for kind, rows in selected_features(dataset, number, teacher, record, codecs):
                sums[kind].add(codecs[kind].decode(rows))
            if all(part.count for part in sums.values()):
                yield {kind: part.moments() for kind, part in sums.items()}


def restore_statistics(part: Part, teacher: CachedTeacher) -> None:
    """Take the statistics of the complete shards of a part from their features, as they are stored."""
    folder, codecs, found = part.teacher(teacher.id), load_codecs(part.cache, teacher), {}
    for record in part.records(folder).values():
        table = folder.read(record, [*codecs])
        rows = {kind: stored_rows(table[kind]) for kind in codecs}
        if len(rows["patches"]):
            found[record.file] = {kind: Moments.of(codec.decode(rows[kind])) for kind, codec in codecs.items()}
    if found:
        folder.store.put(STATISTICS, dump_part_stats(PartStats.of(found)))


def stored_rows(column: pa.ChunkedArray) -> torch.Tensor:
    """The rows [n, row_bytes] uint8 of a column of features that hold some."""
    return torch.from_numpy(fixed_width(column)[with_features(column)])


def needed_records(dataset: Dataset, number: int, teacher: CachedTeacher) -> list[ShardRecord]:
    """Records of the shards of part `number` that hold samples; UserError if one is missing."""
    part = dataset.parts[number]
    folder = part.teacher(teacher.id)
    complete, needed = part.records(folder), dataset.shards_of(number)
    if any(shard not in complete for shard in needed):
        raise UserError(f"{folder.store.uri} lacks shards: run the job again")
    return [complete[shard] for shard in needed]


def selected_features(
    dataset: Dataset, number: int, teacher: CachedTeacher, record: ShardRecord, codecs: dict[str, FeatureCodec]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored rows [n, row_bytes] uint8 of the samples in a shard of part `number`, by token type, some at a time."""
    part, views = dataset.parts[number], dataset.policy.rows_per_image
    folder, images = part.teacher(teacher.id), dataset.chosen_rows(number, record.shard)
    rows = None if images is None else (images[:, None] * views + range(views)).reshape(-1)
    table = folder.read(record, [*codecs])
    for kind in codecs:
        column = table[kind] if rows is None else table[kind].take(pa.array(rows))
        chosen = stored_rows(column)
        yield from ((kind, some) for some in chosen.split(folder.row_group_size) if len(some))
