"""Repair a cache: take out just what verifying found broken, bring that back, and verify it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.cache.audit import Verification, verify_cache
from pipeline.cache.build import CachePlan, SplitPlan, build_cache, freeze_stats, ingest_missing
from pipeline.cache.checks import BrokenError, Finding, check_statistics
from pipeline.cache.dataset import Dataset, write_index
from pipeline.cache.extract import CachedTeacher
from pipeline.cache.shards import ShardFolder
from pipeline.cache.spine import rows_of_shard
from pipeline.cache.store import Store
from pipeline.config import Config
from pipeline.errors import UserError

log = logging.getLogger(__name__)


def repair_cache(plan: CachePlan, config: Config, found: Verification) -> Verification:
    """Bring back what is broken, and verify the shards concerned.

    A teacher that cannot be computed here (`Verification.unable`) keeps what it has, broken as it is.

    Returns:
        What is wrong still.

    Raises:
        UserError: where the source does not give the images of a broken shard any more.
        TeacherError: as `pipeline.cache.build.build_cache`.
    """
    for split in plan.splits:
        mine = [item for item in found.findings if item.dataset == split.dataset.id and item.part not in found.unable]
        _mend_images(split, mine)
        for item in mine:
            if item.part not in ("index", "images", "rows"):
                _take_out(split.dataset.teacher(item.part), item)
    able = replace(plan, teachers=tuple(teacher for teacher in plan.teachers if teacher.id not in found.unable))
    able, _ = build_cache(able, config)
    for split in able.splits:
        for teacher in able.teachers:
            _refreeze(split.dataset, teacher)
    return verify_cache(plan, config, set(_concerned(plan, found)))


def _concerned(plan: CachePlan, found: Verification) -> Iterator[tuple[str, int]]:
    """(split, shard) of every finding; a file that belongs to all shards concerns them all."""
    splits = {split.dataset.id: split for split in plan.splits}
    for item in found.findings:
        split = splits[item.dataset]
        shards = range(split.dataset.shards) if item.shard is None else [item.shard]
        yield from ((split.split, shard) for shard in shards)


def _mend_images(split: SplitPlan, found: Iterable[Finding]) -> None:
    """Bring back index, images and crops, which need no teacher."""
    dataset = split.dataset
    broken = {part: {item.shard for item in found if item.part == part} for part in ("index", "images", "rows")}
    if broken["index"]:
        write_index(dataset, split.index)
    images = sorted(shard for shard in broken["images"] if shard is not None)
    before = dataset.images.listed()
    names = {shard: _take_out_shard(dataset.images, shard) for shard in images}
    ingest_missing([split])
    for shard in images:
        record = dataset.images.record(shard)
        assert record is not None
        known = before[shard].facts["bad"] if shard in before else record.facts["bad"]
        if lost := [sample for sample in record.facts["bad"] if sample not in known]:
            dataset.images.unlist(shard)
            raise UserError(
                f"shard {shard} of {dataset.images.store.uri} is broken, and {dataset.location} does not give "
                f"{len(lost)} of its images any more, first {lost[0]['sample_id']} ({lost[0]['reason']}): restore them"
            )
        if record.file not in names[shard]:
            folders = [ShardFolder(view.sub("rows")) for view in _views(dataset)]
            folders += [ShardFolder(folder) for view in _views(dataset) for folder in _teachers(view)]
            _take_out_dependents(dataset, shard, "images", folders)
    if dataset.policy.crops:
        for shard in range(dataset.shards):
            if shard in broken["rows"] or dataset.rows.record(shard) is None:
                _redraw(dataset, shard)


def _redraw(dataset: Dataset, shard: int) -> None:
    record = dataset.images.record(shard)
    assert record is not None
    names = _take_out_shard(dataset.rows, shard)
    rows_of_shard(dataset, shard, dataset.images.read(record))
    drawn = dataset.rows.record(shard)
    assert drawn is not None
    if drawn.file not in names:
        _take_out_dependents(dataset, shard, "crops", [ShardFolder(folder) for folder in _teachers(dataset.view)])


def _take_out_shard(folder: ShardFolder, shard: int) -> set[str]:
    """Un-list a shard; gives the names that its Parquet file had, which tell its content."""
    record = folder.listed().get(shard)
    names = {name for name in folder.store.files() if name.startswith(f"shard-{shard:05d}-")}
    folder.unlist(shard)
    return names | ({record.file} if record else set())


def _take_out_dependents(dataset: Dataset, shard: int, what: str, folders: Iterable[ShardFolder]) -> None:
    log.warning(
        "%s: the %s of shard %d came back with other bytes than they had (changed images, or another version of "
        "pyarrow): all that was computed of them is computed again",
        dataset.id,
        what,
        shard,
    )
    for folder in folders:
        folder.unlist(shard)


def _views(dataset: Dataset) -> list[Store]:
    views = dataset.store.sub("views")
    return [views.sub(name) for name in views.folders()]


def _teachers(view: Store) -> list[Store]:
    teachers = view.sub("teachers")
    return [teachers.sub(name) for name in teachers.folders()]


def _take_out(folder: ShardFolder, item: Finding) -> None:
    if item.shard is not None:
        folder.unlist(item.shard)
    elif item.file.endswith(("/stats.npz", "/phi_s.npz")):
        _thaw(folder)
    else:
        folder.store.delete(item.file.rpartition("/")[2])


def _thaw(folder: ShardFolder) -> None:
    for name in ("stats.npz", "phi_s.npz"):
        folder.store.delete(name)


def _refreeze(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Shards that were wrong may have entered the frozen statistics."""
    folder = dataset.teacher(teacher.id)
    try:
        check_statistics(folder, teacher)
    except BrokenError as broken:
        log.warning("%s/%s: taken from the repaired shards again", folder.store.uri, broken)
        _thaw(folder)
        freeze_stats(dataset, teacher)
