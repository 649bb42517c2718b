"""Verify the whole cache of a plan; `pipeline/cache/maintain/repair.py` repairs the findings."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from statistics import fmean

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import read_again
from pipeline.cache.fill.decoders import check_decoder
from pipeline.cache.fill.plan import CachePlan, SplitPlan, all_parts
from pipeline.cache.fill.ray_pipeline import finished_shards, run_in_actors
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.dataset import Version, read_version, version_files
from pipeline.cache.layout.part import Part, image_groups, teacher_home
from pipeline.cache.layout.shards import evenly_spaced
from pipeline.cache.layout.stats import Moments, load_moments
from pipeline.cache.maintain.checks import (
    BrokenError,
    Finding,
    check_description,
    check_index,
    check_part,
    check_part_stats,
    check_projections,
    check_records,
    check_samples,
    finding,
    load_file,
)
from pipeline.cache.maintain.values import check_statistics
from pipeline.cache.maintain.verify import Verify
from pipeline.errors import UserError
from pipeline.storage.names import folder_name
from pipeline.storage.store import DamagedError, Store
from teachers.base import WeightsNotFoundError

SAMPLE_GROUPS = 8
"""Row groups of a data set, evenly spaced, that every teacher recomputes: 512 images."""


@dataclass
class Verification:
    """Result of a verification.

    Attributes:
        files: Parquet files of shards that were read.
        recomputed: rows times teachers that were recomputed and compared.
        fidelity: by ``<teacher>/<token type>``, mean cosine of the standardised recomputed features and their stored values,
            and the lowest 1st percentile of a row group.
        skipped: why a teacher could not recompute rows, by label; its files were checked all the same.
        unable: ids of the teachers that cannot be computed here: without weights, with other weights than the cache's, or
            without the decoder of their images.
    """

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    recomputed: int = 0
    fidelity: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unable: set[str] = field(default_factory=set)

    @contextmanager
    def report(self, cache: Store, place: str, what: str, folder: Store) -> Iterator[None]:
        """Add a finding if the block finds a file of the folder broken that belongs to all shards."""
        try:
            yield
        except BrokenError as broken:
            self.findings.append(finding(cache, place, what, folder, None, broken))


def verify_cache(plan: CachePlan, config: CacheJobConfig, only: set[tuple[str, int]] | None = None) -> Verification:
    """Check every file of the plan's data sets, parts and teachers, compare all images with the source, and recompute a sample of
    rows.

    Args:
        only: (part, shard) of the shards to check; None: all, and the source. Files that belong to all shards are always checked.

    Raises:
        UserError, TeacherError: if the cache cannot be used, or a teacher cannot be created.
    """
    check_begun(plan)
    parts = all_parts(plan.splits)
    for part in parts.values():
        part.refresh()
    found = Verification()
    computed = _computed(plan, found)
    indices = dict(_check_parts(plan, parts, found))
    versions = {version.dataset.fingerprint for split in plan.splits for version in _check_versions(split, found)}
    shards = dict.fromkeys((part.key, shard) for split in plan.splits for part, shard in split.dataset.shards)
    rows = [{"part": key, "shard": shard} for key, shard in shards if only is None or (key, shard) in only]
    cosines: defaultdict[str, list[list[float]]] = defaultdict(list)
    labels = teacher_labels(plan.teachers)
    arguments = (parts, plan.teachers, computed, _sampled(plan), indices, _frozen(plan))
    batch_size = config.cache.batch_size
    for row in finished_shards(lambda rows: run_in_actors(Verify, rows, arguments, batch_size), rows, parts, "verify"):
        found.findings += [Finding(**item) for item in json.loads(row["findings"])]
        found.files += row["files"]
        found.recomputed += row["recomputed"]
        for teacher, kind, *figures in json.loads(row["cosines"]):
            cosines[f"{labels[teacher]}/{kind}"].append(figures)
    for name, sums in sorted(cosines.items()):
        counts, means, lows = zip(*sums, strict=True)
        found.fidelity[name] = fmean(means, counts), min(lows)
    found.findings += _check_statistics(plan, found, versions)
    if only is None:
        found.findings += _compare_with_sources(split for split in plan.splits if not split.pinned)
    # Splits share parts and teachers.
    found.findings = sorted(
        {*found.findings}, key=lambda item: (item.place, item.what, -1 if item.shard is None else item.shard, item.file)
    )
    return found


def check_begun(plan: CachePlan) -> None:
    """Raise `UserError` if nothing of a data set is cached."""
    for split in plan.splits:
        if not version_files(split.dataset.store):
            raise UserError(
                f"{split.dataset.store.uri} holds nothing yet: run jobs/precompute.py with this recipe first"
            )


def _computed(plan: CachePlan, found: Verification) -> list[CachedTeacher]:
    """The teachers that can recompute rows, with the digest of their weights; checks what all features of a teacher share."""
    labels = teacher_labels(plan.teachers)
    able = []
    for cached in plan.teachers:
        home, before, recorded = teacher_home(plan.store, cached.id), len(found.findings), None
        with found.report(plan.store, cached.id, cached.id, home):
            recorded = check_description(plan.store, cached)
        with found.report(plan.store, cached.id, cached.id, home):
            check_projections(plan.store, cached)
        teacher = cached.create()
        try:
            teacher.load()
            check_decoder("cache.decoder", cached.decoder)
        except (WeightsNotFoundError, UserError) as error:
            found.skipped[labels[cached.id]] = str(error)
            found.unable.add(cached.id)
            continue
        present = teacher.weights_sha256
        if recorded not in (None, present):
            problem = (
                f"names other weights (SHA-256 {recorded[:12]}) than the present ones ({present[:12]}): set weights to their "
                f"file, or --delete {cached.id}"
            )
            with found.report(plan.store, cached.id, cached.id, home):
                raise BrokenError("teacher.json", problem)
            found.unable.add(cached.id)
        elif len(found.findings) == before:
            able.append(replace(cached, weights_sha256=present))
    return able


def _check_parts(plan: CachePlan, parts: Mapping[str, Part], found: Verification) -> Iterator[tuple[str, list[bytes]]]:
    """The keys of every part whose index is intact, by id; checks descriptions, indices, and records written together."""
    for part in parts.values():
        with found.report(plan.store, part.id, "index", part.store):
            check_part(part)
        folders = {"images": part.images, **{teacher.id: part.teacher(teacher.id) for teacher in plan.teachers}}
        for what, folder in {**folders, **({"rows": part.rows} if part.policy.crops else {})}.items():
            with found.report(plan.store, part.id, what, folder.store):
                check_records(folder)
            with found.report(plan.store, part.id, what, folder.store):
                check_part_stats(folder, part.records(folder))
        with found.report(plan.store, part.id, "index", part.store):
            yield part.id, check_index(part)["key"].to_pylist()


def _check_versions(split: SplitPlan, found: Verification) -> list[Version]:
    """The intact versions of a data set; checks all of them, and their files of samples."""
    cache, store, versions = split.dataset.cache, split.dataset.store, list[Version]()
    name = folder_name(split.dataset.name)
    for file in version_files(store):
        with found.report(cache, name, "version", store):
            try:
                versions.append(read_version(cache, name, file))
            except DamagedError as error:
                raise BrokenError(file, "cannot be read, --repair deletes it and reads its images again") from error
    named_by = {file: version.dataset for version in reversed(versions) for file in version.dataset.sample_files}
    for file, dataset in named_by.items():
        with found.report(cache, name, "samples", store):
            try:
                check_samples(store, file)
            except BrokenError as broken:
                remedy = f"if --repair cannot restore it, --delete {name}/{dataset.fingerprint[:8]}"
                raise BrokenError(file, f"{broken.problem}; {remedy}") from broken
    return versions


def _sampled(plan: CachePlan) -> dict[tuple[str, int], list[int]]:
    """Row groups of images that every teacher recomputes, by part and shard."""
    sampled: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for split in plan.splits:
        parts, needed = split.dataset.parts, {(part.key, shard) for part, shard in split.dataset.shards}
        held = [item for item in image_groups(parts) if (parts[item.part].key, item.shard) in needed]
        for item in evenly_spaced(held, SAMPLE_GROUPS):
            groups = sampled[parts[item.part].key, item.shard]
            groups += [item.group] if item.group not in groups else []
    return dict(sampled)


def _frozen(plan: CachePlan) -> dict[tuple[str, str], Mapping[str, Moments]]:
    """The statistics that recomputed features are standardised by; without those that are missing or broken."""
    found: dict[tuple[str, str], Mapping[str, Moments]] = {}
    for split in plan.splits:
        for teacher in plan.teachers:
            try:
                moments = load_file(split.dataset.statistics(teacher.id), "stats.npz", load_moments)
            except BrokenError:
                continue
            found |= {(part.key, teacher.id): moments for part in split.dataset.parts}
    return found


def _check_statistics(plan: CachePlan, found: Verification, versions: Collection[str]) -> Iterator[Finding]:
    """Check the statistics of the data sets that the cache holds, by fingerprint, as far as their shards can be read."""
    undecodable = {item.place for item in found.findings}
    for split in (split for split in plan.splits if split.dataset.fingerprint in versions):
        for teacher in plan.teachers:
            store = split.dataset.statistics(teacher.id)
            if split.missing(teacher) or teacher.id in undecodable:
                continue
            try:
                with suppress(DamagedError):  # of a shard, which is found with it
                    check_statistics(split.dataset, teacher)
            except BrokenError as broken:
                yield finding(plan.store, folder_name(split.dataset.name), teacher.id, store, None, broken)


def _compare_with_sources(splits: Iterable[SplitPlan]) -> Iterator[Finding]:
    """The data sets whose images differ from their source's, though place, size and version of the files are the same."""
    for split in splits:
        differing = read_again(split)
        if differing.num_rows:
            first = differing["sample_id"][0].as_py()
            problem = f"names images that {split.source.location} gives otherwise: {differing.num_rows}, first {first}"
            store = split.dataset.store
            broken = BrokenError("", problem)
            yield finding(split.dataset.cache, folder_name(split.dataset.name), "source", store, None, broken)
