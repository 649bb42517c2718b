"""Verify the whole cache of a plan; `pipeline/cache/maintain/repair.py` repairs the findings."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import CachePlan, SplitPlan
from pipeline.cache.fill.compare import differing_images
from pipeline.cache.fill.ray_pipeline import finished_shards, run_in_actors
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardFolder, evenly_spaced, row_groups
from pipeline.cache.maintain.checks import (
    BrokenError,
    Finding,
    check_description,
    check_index,
    check_projections,
    finding,
)
from pipeline.cache.maintain.values import check_statistics
from pipeline.cache.maintain.verify import Verify
from pipeline.errors import UserError
from teachers.base import WeightsNotFoundError

SAMPLE_GROUPS = 8
"""Row groups of a dataset, evenly spaced, that every teacher recomputes: 512 images."""


@dataclass
class Verification:
    """Result of a verification.

    Attributes:
        files: Parquet files of shards that were read.
        recomputed: rows times teachers that were recomputed and compared.
        fidelity: by ``<teacher>/<token type>``, mean cosine of the standardised recomputed features and their stored values,
            and the lowest 1st percentile of a row group.
        skipped: why a teacher could not recompute rows, by label; its files were checked all the same.
        unable: ids of the teachers that cannot be computed here, without weights or with other weights than the cache's.
    """

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    recomputed: int = 0
    fidelity: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unable: set[str] = field(default_factory=set)


def verify_cache(plan: CachePlan, config: CacheJobConfig, only: set[tuple[str, int]] | None = None) -> Verification:
    """Check every file of the plan's datasets and teachers, compare all images with the source, and recompute a sample of rows.

    Args:
        only: (split, shard) of the shards to check; None: all. Files that belong to all shards are always checked.

    Raises:
        UserError, TeacherError: if the cache cannot be used, or a teacher cannot be created.
    """
    check_begun(plan)
    for split in plan.splits:
        split.dataset.refresh()
    found = Verification()
    computed = _computed(plan, found)
    for split in plan.splits:
        found.findings += _check_folders(split.dataset, plan.teachers)
    datasets = {split.split: split.dataset for split in plan.splits}
    shards = [(split, shard) for split, dataset in datasets.items() for shard in range(dataset.shards)]
    shards = [shard for shard in shards if only is None or shard in only]
    sampled: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for split in plan.splits:
        for group in evenly_spaced(row_groups(split.dataset.images.listed().values()), SAMPLE_GROUPS):
            sampled[split.split, group.shard].append(group.group)
    unindexed = {item.dataset for item in found.findings if item.part == "index"}
    cosines: defaultdict[str, list[list[float]]] = defaultdict(list)
    labels = teacher_labels(plan.teachers)
    arguments = (datasets, plan.teachers, computed, sampled, unindexed)
    batch_size = config.cache.batch_size
    for row in finished_shards(
        lambda rows: run_in_actors(Verify, rows, arguments, batch_size), shards, datasets, "verify"
    ):
        found.findings += [Finding(**item) for item in json.loads(row["findings"])]
        found.files += row["files"]
        found.recomputed += row["recomputed"]
        for teacher, kind, *figures in json.loads(row["cosines"]):
            cosines[f"{labels[teacher]}/{kind}"].append(figures)
    for name, parts in sorted(cosines.items()):
        counts, means, lows = zip(*parts, strict=True)
        found.fidelity[name] = fmean(means, counts), min(lows)
    broken = {(item.dataset, item.shard) for item in found.findings if item.part == "images"}
    for split in plan.splits:
        intact = [n for name, n in shards if name == split.split and (split.dataset.id, n) not in broken]
        found.findings += _compare_with_source(split, intact)
    found.findings.sort(key=lambda item: (item.dataset, item.part, -1 if item.shard is None else item.shard, item.file))
    return found


def check_begun(plan: CachePlan) -> None:
    """Raise `UserError` if nothing of a dataset is cached."""
    for split in plan.splits:
        if not split.dataset.store.exists("dataset.json"):
            raise UserError(
                f"{split.dataset.store.uri} holds nothing yet: run jobs/precompute.py with this recipe first"
            )


def _computed(plan: CachePlan, found: Verification) -> list[CachedTeacher]:
    """The teachers that can recompute rows, with the digest of their weights."""
    labels = teacher_labels(plan.teachers)
    able = []
    for cached in plan.teachers:
        teacher = cached.create()
        try:
            teacher.load()
        except WeightsNotFoundError as error:
            found.skipped[labels[cached.id]] = str(error)
            found.unable.add(cached.id)
            continue
        others = list(_other_weights(plan, cached, teacher.weights_sha256))
        if others:
            found.findings += others
            found.unable.add(cached.id)
        else:
            able.append(replace(cached, weights_sha256=teacher.weights_sha256))
    return able


def _other_weights(plan: CachePlan, cached: CachedTeacher, present: str) -> Iterator[Finding]:
    for split in plan.splits:
        folder = split.dataset.teacher(cached.id)
        try:
            recorded = check_description(folder, cached)
        except BrokenError:
            continue  # found by _check_folders
        if recorded != present:
            problem = (
                f"names other weights (SHA-256 {recorded[:12]}) than the present ones ({present[:12]}): set weights to their "
                f"file, or --delete {split.dataset.id}/{split.dataset.policy.id}/{cached.id}"
            )
            yield finding(split.dataset, cached.id, folder.store, None, BrokenError("teacher.json", problem))


def _compare_with_source(split: SplitPlan, shards: Sequence[int]) -> Iterator[Finding]:
    """The shards whose images differ from the source's."""
    dataset = split.dataset
    for shard, names in sorted(differing_images(dataset, split.source, split.index, shards).items()):
        record = dataset.images.listing(shard)
        assert record is not None
        problem = f"differs from {dataset.location} in {len(names)} images, first {names[0]}"
        yield finding(dataset, "images", dataset.images.store, shard, BrokenError(record.file, problem))


def _check_folders(dataset: Dataset, teachers: Iterable[CachedTeacher]) -> Iterator[Finding]:
    """Check the files that belong to all shards."""
    try:
        check_index(dataset)
    except BrokenError as broken:
        yield finding(dataset, "index", dataset.store, None, broken)
    for teacher in teachers:
        folder = dataset.teacher(teacher.id)
        listed = len(folder.listed())
        checks: list[Callable[[ShardFolder, CachedTeacher], object]] = [check_description, check_projections]
        if listed == dataset.shards:
            checks.append(check_statistics)
        for check in checks if listed else ():
            try:
                check(folder, teacher)
            except BrokenError as broken:
                if not broken.file.startswith("shard-"):  # found with their shard
                    yield finding(dataset, teacher.id, folder.store, None, broken)
