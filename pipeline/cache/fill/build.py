"""Plan and fill the cache: find out what is missing, and compute just that in two passes.

images     source -> Ingest -> committed `images` shards (and row shards of crops)
teachers   `images` shards -> Extract -> committed teacher shards
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa

from pipeline.cache.config import CacheJobConfig, PrecomputeJobConfig
from pipeline.cache.fill.compare import refuse_other_images
from pipeline.cache.fill.ingest import Ingest, check_quarantine
from pipeline.cache.fill.placement import starved
from pipeline.cache.fill.ray_pipeline import extract_shards, finished_shards, gpus, ingest_shards
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import Dataset, create_dataset, plan_dataset
from pipeline.cache.layout.keys import teacher_id, teacher_identity
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.cache.layout.stats import dump_moments, merge_all
from pipeline.errors import UserError, blame_field
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.runtime.metrics import export
from pipeline.sources.base import Source
from pipeline.sources.left_out import notes_of
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SceneSettings
from pipeline.storage.store import Store

PASSES = 2
"""Passes over what is missing: if two actors fit a projection at the same moment, only the shards of one of them count."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitPlan:
    """One split of the data (``train`` or ``val``): its source, its index and its dataset in the cache."""

    split: str
    source: Source
    index: pa.Table
    dataset: Dataset

    @property
    def left_out(self) -> list[str]:
        """What the source has passed over, in phrases."""
        return notes_of(self.index)

    def missing_images(self) -> list[int]:
        """Shards of `images` that are missing."""
        return self.dataset.missing(self.dataset.images)

    def missing_crops(self) -> list[int]:
        """Row shards of crops that are missing; none for a view without crops."""
        return self.dataset.missing(self.dataset.rows) if self.dataset.policy.crops else []

    def missing(self, teacher: CachedTeacher) -> list[int]:
        """Shards of a teacher that are missing."""
        return self.dataset.missing(self.dataset.teacher(teacher.id))


@dataclass(frozen=True)
class CachePlan:
    """What a job needs from the cache; made without writing anything, before anything expensive starts."""

    store: Store
    splits: tuple[SplitPlan, ...]
    teachers: tuple[CachedTeacher, ...]

    def split(self, name: str) -> SplitPlan | None:
        """The plan of ``train`` or ``val``."""
        return next((split for split in self.splits if split.split == name), None)


@dataclass
class BuildReport:
    """What filling the cache did.

    Attributes:
        shards_computed: teacher shards.
        images_ingested: images of the missing shards of `images`.
        images_extracted: pairs of image and teacher.
        quarantined: samples left out, by split, each with ``sample_id`` and ``reason``.
    """

    shards_computed: int = 0
    images_ingested: int = 0
    images_extracted: int = 0
    seconds: float = 0.0
    quarantined: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def plan_cache(
    config: PrecomputeJobConfig, store: Store, snapshot: RecordSnapshot | None = None, compare: bool = True
) -> CachePlan:
    """Index the sources and name every folder that the job needs; its plans may share a snapshot.

    Args:
        compare: refuse other images than the cached ones where files have changed (`pipeline.cache.fill.compare`).

    Raises:
        UserError, TeacherError: if a source, a teacher or the cache does not match the configuration.
    """
    cached = tuple(_cached_teacher(config, index) for index in range(len(config.teachers)))
    ids = [teacher.id for teacher in cached]
    for twin in {name for name in ids if ids.count(name) > 1}:
        raise UserError(f"teachers: {twin} is listed {ids.count(twin)} times; list each teacher once")
    policy = ViewPolicy(**config.views.model_dump(exclude={"per_step"}), seed=config.seed)
    return CachePlan(store, plan_splits(config, store, policy, snapshot, compare), cached)


def plan_splits(
    config: CacheJobConfig,
    store: Store,
    policy: ViewPolicy = WHOLE,
    snapshot: RecordSnapshot | None = None,
    compare: bool = True,
) -> tuple[SplitPlan, ...]:
    """As `plan_cache`, without teachers; `policy` is for the training images, held-out images are always whole."""
    snapshot = snapshot or RecordSnapshot()
    splits = {"train": (config.data.train, policy), "val": (config.data.held_out, WHOLE)}
    planned = [_plan_split(config, store, split, at, views, snapshot) for split, (at, views) in splits.items() if at]
    for split in planned if compare else ():
        if split.dataset.store.uri not in snapshot.compared:
            refuse_other_images(split.dataset, split.source, split.index)
            snapshot.compared.add(split.dataset.store.uri)
    return tuple(planned)


def _cached_teacher(config: PrecomputeJobConfig, index: int) -> CachedTeacher:
    teacher, cache = config.teachers[index], config.cache
    field, name = (f"teachers.{index}.codec", teacher.codec) if teacher.codec else ("cache.codec", cache.codec)
    with blame_field(field):
        codec = Codec.parse(name)
    spec = make_teacher(teacher).spec
    if codec.components and codec.components > spec.patch_dim:
        raise UserError(f"{field}: {name} keeps more components than the {spec.patch_dim} channels of {spec.name}")
    return CachedTeacher(teacher, spec, teacher_id(spec, name, cache.precision), name, cache.precision)


def _plan_split(
    config: CacheJobConfig, store: Store, split: str, location: str, policy: ViewPolicy, snapshot: RecordSnapshot
) -> SplitPlan:
    data = config.data
    with blame_field(f"data.{split}"):
        source = open_source(
            location,
            split=split,
            image_column=data.image_column,
            label_column=data.label_column,
            samples=SceneSettings(getattr(data.samples, split), data.samples.size, config.seed),
        )
    name = f"{data.name}-{split}" if data.name else source.name
    dataset, index = plan_dataset(store, source, name, config.cache.shard_size, policy, snapshot)
    return SplitPlan(split, source, index, dataset)


def check_weights(*plans: CachePlan) -> None:
    """Find out whether the weights that are still needed can be loaded, as far as a plan can know.

    Raises:
        TeacherError: if they cannot be had, or are those of another network.
    """
    pairs = ((split, teacher) for plan in plans for split in plan.splits for teacher in plan.teachers)
    needed = {teacher.id: teacher for split, teacher in pairs if split.missing(teacher)}
    for teacher in needed.values():
        teacher.create().check()


def build_cache(plan: CachePlan, config: CacheJobConfig) -> tuple[CachePlan, BuildReport]:
    """Compute and commit what is missing; returns the plan with the digests of the teachers' weights, and a report.

    Raises:
        UserError, TeacherError: for user-fixable failures; all committed shards stay.
    """
    started = time.perf_counter()
    report = BuildReport()
    # Weights first: a missing file must not be discovered after hours of decoding.
    plan = replace(plan, teachers=tuple(_with_weights(plan, teacher) for teacher in plan.teachers))
    for split in plan.splits:
        create_dataset(split.dataset, split.index)
    report.images_ingested = ingest_missing(plan.splits)
    for split in plan.splits:
        records = split.dataset.records(split.dataset.images).values()
        report.quarantined[split.split] = check_quarantine(split.dataset, records, config.data.max_bad)
        if not any(record.rows for record in records):
            raise UserError(f"{split.dataset.location}: none of the images can be read")
    export("index", {"quarantined": sum(map(len, report.quarantined.values()))})
    _extract(plan, config.cache.batch_size, report)
    for split in plan.splits:
        for teacher in plan.teachers:
            freeze_stats(split.dataset, teacher)
    report.seconds = time.perf_counter() - started
    return plan, report


def _with_weights(plan: CachePlan, cached: CachedTeacher) -> CachedTeacher:
    """Fill in the digest of the weights, loading them only if needed; refuse a folder made with other weights."""
    folders = [split.dataset.teacher(cached.id).store for split in plan.splits]
    described = all(folder.exists("teacher.json") for folder in folders)
    if described and not any(split.missing(cached) for split in plan.splits):
        return replace(cached, weights_sha256=_recorded_digest(folders[0]))
    teacher = cached.create()
    teacher.load()
    for folder in folders:
        known = _recorded_digest(folder) if folder.exists("teacher.json") else None
        if known not in (None, teacher.weights_sha256):
            raise UserError(
                f"{folder.uri} was made with other weights of {cached.spec.name} (SHA-256 {str(known)[:12]}) "
                f"than the present ones ({teacher.weights_sha256[:12]}): set weights to their file, or delete that folder"
            )
        if known is None:
            description = {**asdict(cached.spec), **teacher_identity(cached.spec, cached.codec, cached.precision)}
            description |= {"id": cached.id, "weights_sha256": teacher.weights_sha256}
            folder.put("teacher.json", json.dumps(description, indent=2, sort_keys=True).encode())
    return replace(cached, weights_sha256=teacher.weights_sha256)


def _recorded_digest(folder: Store) -> str:
    try:
        return str(json.loads(folder.get("teacher.json"))["weights_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.uri}/teacher.json cannot be read ({error}): run jobs/precompute.py with this recipe and --repair"
        ) from error


def ingest_missing(splits: Sequence[SplitPlan], known: Mapping[tuple[str, int], Set[str]] | None = None) -> int:
    """Commit the missing shards of `images` and of crops; returns the number of images that were missing.

    `known` is that of `Ingest`. Raises UserError if the source or the cache cannot be used.
    """
    ingest = Ingest({split.split: (split.dataset, split.source) for split in splits}, known or {})
    missing = {split.split: split.missing_images() for split in splits}
    shards = {split.split: sorted({*missing[split.split], *split.missing_crops()}) for split in splits}
    pairs = [(name, shard) for name, numbers in shards.items() for shard in numbers]
    datasets = {split.split: split.dataset for split in splits}
    for _ in finished_shards(lambda rows: ingest_shards(rows, ingest), pairs, datasets, "index"):
        pass
    for name, dataset in datasets.items():
        dataset.refresh(shards[name])
    return sum(datasets[name].shard_rows(shard) for name, numbers in missing.items() for shard in numbers)


def _extract(plan: CachePlan, batch_size: int, report: BuildReport) -> None:
    for _ in range(PASSES):
        if missing := _missing(plan):
            _extract_missing(plan, missing, batch_size, report)
    for (_, name), left in _missing(plan).items():
        raise UserError(f"{len(left)} shards of {name} were not committed, first {left[0]}: run the job again")


def _missing(plan: CachePlan) -> dict[tuple[str, str], list[int]]:
    """Missing shards by split and teacher id, without the pairs that lack none."""
    pairs = ((split, teacher) for split in plan.splits for teacher in plan.teachers)
    return {(split.split, teacher.id): shards for split, teacher in pairs if (shards := split.missing(teacher))}


def _extract_missing(
    plan: CachePlan, missing: Mapping[tuple[str, str], Sequence[int]], batch_size: int, report: BuildReport
) -> None:
    ids = {teacher for _, teacher in missing}
    needed = [teacher for teacher in plan.teachers if teacher.id in ids]
    shards = sorted({(split, shard) for (split, _), lacking in missing.items() for shard in lacking})
    datasets = {split.split: split.dataset for split in plan.splits}
    label = f"extract {' '.join(teacher.spec.name for teacher in needed)}"
    started = time.perf_counter()
    stages: defaultdict[str, float] = defaultdict(float)
    finished = finished_shards(
        lambda rows: extract_shards(rows, (datasets, needed), batch_size), shards, datasets, label
    )
    for number, row in enumerate(finished, 1):
        report.shards_computed += row["computed"]
        report.images_extracted += row["images"] * row["computed"]
        for stage, seconds in json.loads(row["stages"]).items():
            stages[stage] += seconds
        speed = report.images_extracted / (time.perf_counter() - started)
        todo = len(shards) - number
        export("extract", {"shards": report.shards_computed, "shards_left": todo, "images_per_second": speed})
    for split in {split for split, _ in shards}:
        datasets[split].refresh(shard for name, shard in shards if name == split)
    if reason := starved(stages, time.perf_counter() - started, gpus()):
        log.warning(reason)


def freeze_stats(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Merge the statistics of all shards of a complete teacher, unless that was done."""
    folder = dataset.teacher(teacher.id)
    if folder.store.exists("stats.npz"):
        return
    merged = merge_all(folder.moments(record for record in dataset.records(folder).values() if record.moments))
    folder.store.put("stats.npz", dump_moments(merged))
