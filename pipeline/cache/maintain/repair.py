"""Repair a cache: unlist just what verification found broken, compute it again, and verify it."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import CachePlan, SplitPlan, build_cache, freeze_stats, ingest_missing
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset, changed_rows, discard_stats, write_index
from pipeline.cache.layout.shards import ShardFolder
from pipeline.cache.maintain.audit import Verification, verify_cache
from pipeline.cache.maintain.checks import BrokenError, Finding
from pipeline.cache.maintain.values import check_statistics

log = logging.getLogger(__name__)


def repair_cache(plan: CachePlan, config: CacheJobConfig, found: Verification) -> Verification:
    """Compute what is broken again, and verify the affected shards; returns the findings that are left.

    Shards of a teacher that cannot be computed here (`Verification.unable`) stay as they are, even if broken.

    Raises:
        UserError, TeacherError: as `build_cache`, and if the source no longer provides the images of a broken shard.
    """
    for split in plan.splits:
        mine = [item for item in found.findings if item.dataset == split.dataset.id and item.part not in found.unable]
        _repair_images(split, mine)
        for item in mine:
            if item.part not in ("index", "images", "rows"):
                _remove(split.dataset.teacher(item.part), item)
        split.dataset.refresh()
    able = replace(plan, teachers=tuple(teacher for teacher in plan.teachers if teacher.id not in found.unable))
    able, _ = build_cache(able, config)
    for split in able.splits:
        for teacher in able.teachers:
            _merge_again(split.dataset, teacher)
    return verify_cache(plan, config, set(_affected(plan, found)))


def _affected(plan: CachePlan, found: Verification) -> Iterator[tuple[str, int]]:
    """(split, shard) of every finding; a file that belongs to all shards affects them all."""
    splits = {split.dataset.id: split for split in plan.splits}
    for item in found.findings:
        split = splits[item.dataset]
        shards = range(split.dataset.shards) if item.shard is None else [item.shard]
        yield from ((split.split, shard) for shard in shards)


def _repair_images(split: SplitPlan, found: Iterable[Finding]) -> None:
    """Write the index, images and crops again, which needs no teacher."""
    dataset = split.dataset
    images = _shards(found, "images")
    if any(item.part == "index" for item in found) or (images and len(changed_rows(dataset, split.index))):
        write_index(dataset, split.index)  # which also says where the images are now
    bad = {shard: record.facts["bad"] for shard, record in dataset.images.listed().items() if "bad" in record.facts}
    known = {(split.split, shard): {sample["sample_id"] for sample in bad[shard]} for shard in images & bad.keys()}
    for shard in images:
        dataset.images.unlist(shard)
    for shard in _shards(found, "rows"):
        dataset.rows.unlist(shard)
    dataset.refresh()
    ingest_missing([split], known)


def _shards(found: Iterable[Finding], part: str) -> set[int]:
    return {item.shard for item in found if item.part == part and item.shard is not None}


def _remove(folder: ShardFolder, item: Finding) -> None:
    if item.shard is not None:
        folder.unlist(item.shard)
    elif item.file.endswith(("/stats.npz", "/phi_s.npz")):
        discard_stats(folder)
    else:
        folder.store.delete(item.file.rpartition("/")[2])


def _merge_again(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Merge the statistics again if broken shards have gone into them."""
    folder = dataset.teacher(teacher.id)
    try:
        check_statistics(folder, teacher)
    except BrokenError as broken:
        log.warning("%s/%s: merged from the repaired shards again", folder.store.uri, broken)
        discard_stats(folder)
        freeze_stats(dataset, teacher)
