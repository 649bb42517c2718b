"""Plan and fill the cache: what is there, what is missing, and the two passes that compute just that.

images     source -> Ingest -> committed `images` shards
teachers   `images` shards -> Extract -> committed teacher shards
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import pyarrow as pa

from pipeline.cache.fill.ingest import Ingest, check_quarantine
from pipeline.cache.fill.placement import starved
from pipeline.cache.fill.ray_pipeline import extract_shards, gpus, ingest_shards
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import Dataset, create_dataset, plan_dataset
from pipeline.cache.layout.keys import teacher_id, teacher_identity
from pipeline.cache.layout.phi_s import PhiS, dump_phi_s
from pipeline.cache.layout.stats import Moments, dump_moments, load_moments, merge_all
from pipeline.config.load import Config
from pipeline.errors import UserError, naming
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.runtime.metrics import export
from pipeline.runtime.progress import Progress
from pipeline.sources.base import Source
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SceneSettings
from pipeline.storage.store import Store, report_damage

PASSES = 2
"""Over what is missing: of two actors that fitted a projection in the same moment only one's shards count."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitPlan:
    """One split of the data (``train`` or ``val``): its source, its index and the dataset it is in the cache."""

    split: str
    source: Source
    index: pa.Table
    dataset: Dataset

    def missing_images(self) -> list[int]:
        """Shards of `images` that are not there."""
        done = self.dataset.images.records()
        return [shard for shard in range(self.dataset.shards) if shard not in done]

    def missing(self, teacher: CachedTeacher) -> list[int]:
        """Shards of a teacher that are not there."""
        done = self.dataset.teacher(teacher.id).records()
        return [shard for shard in range(self.dataset.shards) if shard not in done]


@dataclass(frozen=True)
class CachePlan:
    """What a job needs of the cache; made before anything expensive starts, and writes nothing."""

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
        shards_computed: teacher shards, over all splits.
        images_ingested: images that went through `Ingest`.
        images_extracted: pairs of image and teacher that were computed.
        seconds: wall-clock time.
        quarantined: by split, the samples left out, each with ``sample_id`` and ``reason``.
    """

    shards_computed: int = 0
    images_ingested: int = 0
    images_extracted: int = 0
    seconds: float = 0.0
    quarantined: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def plan_cache(config: Config, store: Store, teachers: bool = True) -> CachePlan:
    """Index the sources and name every folder that the job needs.

    Args:
        teachers: whether the teachers are needed, or only the images.

    Raises:
        UserError, TeacherError: where a source, a teacher or the cache is not as the configuration says.
    """
    cached = tuple(_cached_teacher(config, index) for index in range(len(config.teachers))) if teachers else ()
    ids = [teacher.id for teacher in cached]
    for twin in {name for name in ids if ids.count(name) > 1}:
        raise UserError(f"teachers: {twin} is listed {ids.count(twin)} times; give each teacher once")
    locations = {"train": config.data.train, "val": config.data.held_out}
    splits = tuple(_plan_split(config, store, split, where) for split, where in locations.items() if where)
    return CachePlan(store, splits, cached)


def _cached_teacher(config: Config, index: int) -> CachedTeacher:
    teacher, cache = config.teachers[index], config.cache
    field, name = (f"teachers.{index}.codec", teacher.codec) if teacher.codec else ("cache.codec", cache.codec)
    with naming(field):
        codec = Codec.parse(name)
    spec = make_teacher(teacher).spec
    if codec.components and codec.components > spec.patch_dim:
        raise UserError(f"{field}: {name} keeps more components than the {spec.patch_dim} channels of {spec.name}")
    return CachedTeacher(teacher, spec, teacher_id(spec, name, cache.precision), name, cache.precision)


def _plan_split(config: Config, store: Store, split: str, location: str) -> SplitPlan:
    data = config.data
    with naming(f"data.{split}"):
        source = open_source(
            location,
            split=split,
            image_column=data.image_column,
            label_column=data.label_column,
            samples=SceneSettings(getattr(data.samples, split), data.samples.size, config.seed),
        )
    name = f"{data.name}-{split}" if data.name else source.name
    policy = (
        ViewPolicy(**config.views.model_dump(exclude={"per_step"}), seed=config.seed) if split == "train" else WHOLE
    )
    dataset, rows = plan_dataset(store, source, name, config.cache.shard_size, policy)
    return SplitPlan(split, source, rows, dataset)


def build_cache(plan: CachePlan, config: Config) -> tuple[CachePlan, BuildReport]:
    """Compute and commit what is missing.

    Returns:
        The plan with the teachers' weight digests filled in, and what was done.

    Raises:
        UserError, TeacherError: for whatever the user can mend; all that was committed stays.
    """
    started = time.perf_counter()
    report = BuildReport()
    # Weights are looked for first: a missing file must not be found out after hours of decoding.
    plan = replace(plan, teachers=tuple(_with_weights(plan, teacher) for teacher in plan.teachers))
    for split in plan.splits:
        create_dataset(split.dataset, split.index)
    report.images_ingested = ingest_missing(plan.splits)
    for split in plan.splits:
        records = split.dataset.images.records().values()
        report.quarantined[split.split] = check_quarantine(split.dataset, records, config.data.max_bad)
        if not any(record.rows for record in records):
            raise UserError(f"{split.dataset.location}: not one image can be read")
    export("index", {"quarantined": sum(map(len, report.quarantined.values()))})
    _extract(plan, config.cache.batch_size, report)
    for split in plan.splits:
        for teacher in plan.teachers:
            freeze_stats(split.dataset, teacher)
    report.seconds = time.perf_counter() - started
    return plan, report


def _with_weights(plan: CachePlan, cached: CachedTeacher) -> CachedTeacher:
    """Learn the digest of the weights where they are needed, and refuse a folder that was made with others."""
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
                f"than the present ones ({teacher.weights_sha256[:12]}): name their file in weights, or delete that folder"
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
    """Commit the shards of `images` that are not there; gives the number of images that went through `Ingest`.

    Args:
        known: as of `Ingest`.

    Raises:
        UserError: where the source or the cache cannot be used.
    """
    ingest = Ingest({split.split: (split.dataset, split.source) for split in splits}, known or {})
    rows = [{"split": split.split, "shard": shard} for split in splits for shard in split.missing_images()]
    total = _images(splits, rows)
    with Progress(total, "img", "index") as progress:
        for row in ingest_shards(rows, ingest):
            _raise_error(row)
            progress.update(row["images"])
    return total


def _extract(plan: CachePlan, batch_size: int, report: BuildReport) -> None:
    missing = _missing(plan)
    for _ in range(PASSES):
        if not missing:
            return
        _extract_missing(plan, missing, batch_size, report)
        missing = _missing(plan)
    for (_, teacher), left in missing.items():
        raise UserError(f"{len(left)} shards of {teacher} were not committed, first {left[0]}: run the job again")


def _missing(plan: CachePlan) -> dict[tuple[str, str], list[int]]:
    """Shards that are not there by split and teacher id, where there are such; reads every record."""
    pairs = ((split, teacher) for split in plan.splits for teacher in plan.teachers)
    return {(split.split, teacher.id): shards for split, teacher in pairs if (shards := split.missing(teacher))}


def _extract_missing(
    plan: CachePlan, missing: Mapping[tuple[str, str], Sequence[int]], batch_size: int, report: BuildReport
) -> None:
    ids = {teacher for _, teacher in missing}
    needed = [teacher for teacher in plan.teachers if teacher.id in ids]
    pairs = {(split, shard) for (split, _), shards in missing.items() for shard in shards}
    rows = [{"split": split, "shard": shard} for split, shard in sorted(pairs)]
    datasets = {split.split: split.dataset for split in plan.splits}
    label = f"extract {' '.join(teacher.spec.name for teacher in needed)}"
    started = time.perf_counter()
    stages: defaultdict[str, float] = defaultdict(float)
    with Progress(_images(plan.splits, rows), "img", label) as progress:
        for number, row in enumerate(extract_shards(rows, (datasets, needed), batch_size), 1):
            _raise_error(row)
            report.shards_computed += row["computed"]
            report.images_extracted += row["images"] * row["computed"]
            for stage, seconds in json.loads(row["stages"]).items():
                stages[stage] += seconds
            progress.update(datasets[row["split"]].shard_rows(row["shard"]))
            speed = report.images_extracted / (time.perf_counter() - started)
            todo = len(rows) - number
            export("extract", {"shards": report.shards_computed, "shards_left": todo, "images_per_second": speed})
    if reason := starved(stages, time.perf_counter() - started, gpus()):
        log.warning(reason)


def _images(splits: Sequence[SplitPlan], rows: Sequence[dict[str, Any]]) -> int:
    datasets = {split.split: split.dataset for split in splits}
    return sum(datasets[row["split"]].shard_rows(row["shard"]) for row in rows)


def _raise_error(row: dict[str, Any]) -> None:
    if row["error"]:
        raise UserError(row["error"])


def freeze_stats(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Merge the statistics of all shards of a complete teacher and derive its PHI-S rotation, once."""
    folder = dataset.teacher(teacher.id)
    if folder.store.exists("stats.npz"):
        return
    merged = merge_all(folder.moments(record for record in folder.records().values() if record.moments))
    folder.store.put("phi_s.npz", dump_phi_s({kind: PhiS.of(moments) for kind, moments in merged.items()}))
    folder.store.put("stats.npz", dump_moments(merged))


def teacher_stats(dataset: Dataset, teacher: CachedTeacher) -> dict[str, Moments]:
    """Frozen statistics of a teacher over a dataset, by token type."""
    store = dataset.teacher(teacher.id).store
    with report_damage(f"{store.uri}/stats.npz"):
        return load_moments(store.get("stats.npz"))


def teacher_fidelity(dataset: Dataset, teacher: CachedTeacher) -> dict[str, dict[str, float]]:
    """What the codec keeps of a teacher's features, by token type: means over the shards, of the 1st percentile the least."""
    records = [record for record in dataset.teacher(teacher.id).records().values() if record.rows]
    figures = {kind: [record.facts["fidelity"][kind] for record in records] for kind in teacher.shapes}
    return {
        kind: {
            name: min(part[name] for part in parts) if name == "cosine_p1" else fmean(part[name] for part in parts)
            for name in ("cosine", "cosine_p1", "relative_error")
        }
        for kind, parts in figures.items()
        if parts
    }
