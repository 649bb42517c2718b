"""Fill the cache of a plan: compute just what is missing, in three passes.

read       new rows of the sources' listings -> keys of their images, which say what the cache holds of them;
           new archives of a store -> their images, staged, with keys
images     sources or staging -> Ingest -> committed `images` shards (and row shards of crops) of new parts
teachers   `images` shards -> Extract -> committed teacher shards
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.digest import KEYED_SCHEMA, Digest, keyed, slices
from pipeline.cache.fill.draft import WAVE_IMAGES, VersionDraft
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.ingest import Ingest, check_quarantine, ingest_row
from pipeline.cache.fill.listing import compare_again
from pipeline.cache.fill.placement import starved
from pipeline.cache.fill.plan import CachePlan, SplitPlan, all_parts
from pipeline.cache.fill.ray_pipeline import extract_shards, finished_shards, gpus, run_tasks
from pipeline.cache.fill.staging import Stage, Staging, stage_row
from pipeline.cache.fill.statistics import freeze_stats
from pipeline.cache.fill.waves import Names, ingest_rows, new_waves, read_wave, waves
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import BAD_SCHEMA, SAMPLE_SCHEMA, write_dataset
from pipeline.cache.layout.keys import sealed, teacher_identity, unsealed
from pipeline.cache.layout.part import Part, teacher_home
from pipeline.errors import UserError
from pipeline.runtime.metrics import export
from pipeline.runtime.progress import Progress
from pipeline.sources.base import INDEX_SCHEMA, NoImagesError, Source
from pipeline.sources.streamed import StreamedSource, streamed
from pipeline.storage.files import Entry
from pipeline.storage.store import Store

PASSES = 2
"""Passes over what is missing: if two actors fit a projection at the same moment, only the shards of one of them count."""

SCATTER_BYTES = 1 << 30
"""Up to this size, a source that reads fast only in its own order is read in random order all the same."""

log = logging.getLogger(__name__)


@dataclass
class BuildReport:
    """What filling the cache did.

    Attributes:
        shards_computed: teacher shards.
        images_read: images that were new, or whose files had changed.
        images_ingested: images that no part held.
        images_extracted: pairs of view and teacher.
        quarantined: samples left out, by split, each with ``sample_id`` and ``reason``.
    """

    shards_computed: int = 0
    images_read: int = 0
    images_ingested: int = 0
    images_extracted: int = 0
    seconds: float = 0.0
    quarantined: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def build_cache(plan: CachePlan, config: CacheJobConfig) -> tuple[CachePlan, BuildReport]:
    """Compute and commit what is missing; returns the plan of the complete cache, with the digests of the teachers' weights, and
    a report.

    Raises:
        UserError, TeacherError: for user-fixable failures; all committed shards stay.
    """
    started = time.perf_counter()
    report = BuildReport()
    # Weights first: a missing file must not be discovered after hours of decoding.
    plan = replace(plan, teachers=tuple(_with_weights(plan, teacher) for teacher in plan.teachers))
    plan = replace(plan, splits=tuple(s if s.listing.is_known else _relisted(s) for s in plan.splits))
    unopened = any(split.listing.unopened for split in plan.splits)
    plan = replace(plan, splits=read_images(plan.splits, plan.shard_size, report))
    if unopened:
        check_space(plan)  # their images were not counted before
    for split in plan.splits:
        report.quarantined[split.split] = check_quarantine(split.dataset, split.listing.bad, config.data.max_bad)
    export("index", {"quarantined": sum(map(len, report.quarantined.values()))})
    _extract(plan, config.cache.batch_size, report)
    for split in plan.splits:
        for teacher in plan.teachers:
            freeze_stats(split.dataset, teacher)
    report.seconds = time.perf_counter() - started
    return plan, report


def _with_weights(plan: CachePlan, cached: CachedTeacher) -> CachedTeacher:
    """Fill in the digest of the weights, loading them only if needed; refuse features made with other weights."""
    home = teacher_home(plan.store, cached.id)
    known = _recorded_digest(home) if home.exists("teacher.json") else None
    if known is not None and not any(not split.listing.is_known or split.missing(cached) for split in plan.splits):
        return replace(cached, weights_sha256=known)
    teacher = cached.create()
    teacher.load()
    if known not in (None, teacher.weights_sha256):
        raise UserError(
            f"{home.uri} was made with other weights of {cached.spec.name} (SHA-256 {str(known)[:12]}) "
            f"than the present ones ({teacher.weights_sha256[:12]}): set weights to their file, or delete that teacher "
            f"(jobs/precompute.py --delete {cached.id})"
        )
    if known is None:
        identity = teacher_identity(
            cached.spec, cached.codec, cached.precision, cached.config.basis, cached.decoder, cached.share
        )
        description = {**asdict(cached.spec), **identity}
        description |= {"id": cached.id, "weights_sha256": teacher.weights_sha256}
        home.put("teacher.json", sealed(description))
    return replace(cached, weights_sha256=teacher.weights_sha256)


def _recorded_digest(folder: Store) -> str:
    try:
        return str(unsealed(folder.get("teacher.json"))["weights_sha256"])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder.uri}/teacher.json cannot be read ({error}): run jobs/precompute.py with this recipe and --repair"
        ) from error


def read_images(splits: Sequence[SplitPlan], shard_size: int, report: BuildReport) -> tuple[SplitPlan, ...]:
    """Read the images that are new, store those that no part holds, and write the versions of the data sets.

    Raises:
        UserError: if a source or the cache cannot be used, or none of the images can be read.
    """
    made: dict[str, Part] = {}
    staged: list[Staging] = []
    complete = []
    several = sum(split.new.num_rows for split in splits) > WAVE_IMAGES
    read = {} if several else _digest([(split, split.new) for split in splits])
    for split in splits:
        draft = VersionDraft(split, shard_size, made)
        if several:
            _add_waves(split, draft, report)
        else:
            report.images_read += split.new.num_rows
            draft.add(*read.pop(split.split), _scattered(split))
        notes = _add_archives(split, draft, report, staged)
        complete.append(draft.finish(notes))
    report.images_ingested += ingest_missing(complete)
    for split in complete:
        if not split.dataset.count:
            raise UserError(f"{split.dataset.location}: none of the images can be read")
    written = [replace(split, dataset=write_dataset(split.dataset, split.listing.damaged)) for split in complete]
    for staging in staged:
        staging.delete()
    return tuple(written)


def _add_waves(split: SplitPlan, draft: VersionDraft, report: BuildReport) -> None:
    """Read the new rows of a split in waves, each of which is stored before the next is read."""
    for wave in new_waves(split):
        report.images_read += wave.num_rows
        images, bad = _digest([(split, wave)])[split.split]
        del wave  # its rows are freed before the next is made
        placed = draft.add(images, bad, _scattered(split))
        del images
        draft.write()
        report.images_ingested += _ingest_placed(split, placed)


def _ingest_placed(split: SplitPlan, placed: Sequence[tuple[Part, pa.Table]], staged: pa.Table | None = None) -> int:
    """Commit the missing shards that these samples make up; returns the number of their images."""
    rows = ingest_rows(split.split, placed, staged)
    return _ingest(rows, {part.key: part for part, _ in placed}, {split.split: split.source})


def _add_archives(split: SplitPlan, draft: VersionDraft, report: BuildReport, done: list[Staging]) -> tuple[str, ...]:
    """Read the unopened archives of a split, and store their images; what they hold besides, in phrases.

    What is still staged of them is added to `done`.
    """
    source, names, passed_over = streamed(split.source), Names(split.listing.unopened), list[str]()
    if source is None or not split.listing.unopened:
        return ()
    source = source.prepared([archive.path for archive in split.listing.unopened])
    samples = 0
    for wave in waves(split.listing.unopened):
        _stage(split, source, wave)
        for group in read_wave(split.dataset.cache, wave, source):
            for staging, staged in group:
                names.check(staging.archive, staged.samples)
                passed_over.append(staged.passed_over)
            images, bad = (
                pa.concat_tables([getattr(staged, name) for _, staged in group]) for name in ("samples", "bad")
            )
            placed = draft.add(images, bad, scatter=True)
            samples += images.num_rows + bad.num_rows
            report.images_ingested += _ingest_placed(split, placed, images)
            for staging, _ in group:
                staging.drop_images()
                done.append(staging)
    report.images_read += samples
    notes = tuple(source.notes(passed_over))
    if not (samples or split.counted):
        besides = f"; left out: {'; '.join(notes)}" if notes else ""
        raise NoImagesError(f"{source.location}: no images found in {len(passed_over)} files{besides}")
    if found := [note for note in notes if note not in split.left_out]:  # the plan did not know of them
        log.warning("data.%s left out: %s", split.split, "; ".join(found))
    return notes


def _stage(split: SplitPlan, source: StreamedSource, wave: Sequence[Entry]) -> None:
    """Stage archives; those that can be read are kept for the next start if others cannot.

    Raises:
        UserError: at once if the store fails, else with the first that cannot be read.
    """
    rows = [stage_row(split.split, number, archive) for number, archive in enumerate(wave)]
    errors = []
    with Progress(len(rows), "archives", f"read {split.split}") as progress:
        for row in run_tasks(rows, Stage(split.dataset.cache, {split.split: source})):
            if row["lost"]:
                raise UserError(row["error"])
            errors += [row["error"]] if row["error"] else []
            progress.update()
    if errors:
        more = f" (and {len(errors) - 1} more that cannot be read)" if len(errors) > 1 else ""
        raise UserError(f"{min(errors)}{more}")


def read_again(split: SplitPlan) -> pa.Table:
    """The known samples whose images the source gives otherwise now (`SAMPLE_SCHEMA`), all of which are read."""
    tables = (split.listing.samples(part.id) for part in split.dataset.parts)
    known = pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *tables]).sort_by("sample_id")
    current, _ = _digest([(split, known.select(INDEX_SCHEMA.names))])[split.split]
    same = known.select(["sample_id", "key"]).join(
        current.select(["sample_id", "key"]), ["sample_id", "key"], join_type="inner"
    )
    return known.filter(pc.invert(pc.is_in(known["sample_id"], same["sample_id"].combine_chunks())))


def _relisted(split: SplitPlan) -> SplitPlan:
    """The plan as of now: an earlier phase or another job may have read its new images meanwhile."""
    listing, dataset = compare_again(split.listing, split.dataset)
    return replace(split, listing=listing, dataset=dataset)


def _digest(wave: Sequence[tuple[SplitPlan, pa.Table]]) -> dict[str, tuple[pa.Table, pa.Table]]:
    """These rows of splits as images with their keys, and those that cannot be used."""
    found: dict[str, tuple[list[pa.Table], list[pa.Table]]] = {
        split.split: ([KEYED_SCHEMA.empty_table()], [BAD_SCHEMA.empty_table()]) for split, _ in wave
    }
    digest = Digest({split.split: split.source for split, _ in wave})
    rows = [row for split, listed in wave for row in slices(split.split, listed)]
    with Progress(sum(listed.num_rows for _, listed in wave), "img", "read") as progress:
        for row in run_tasks(rows, digest):
            if row["error"]:
                raise UserError(row["error"])
            images, bad = keyed(row)
            progress.update(images.num_rows + bad.num_rows)
            found[row["split"]][0].append(images)
            found[row["split"]][1].append(bad)
    return {name: (pa.concat_tables(images), pa.concat_tables(bad)) for name, (images, bad) in found.items()}


def _scattered(split: SplitPlan) -> bool:
    """Whether new images are stored in another order than the source's, which may be fast to read only in its own."""
    return split.source.random_access or (pc.sum(split.new["size"]).as_py() or 0) <= SCATTER_BYTES


def ingest_missing(splits: Sequence[SplitPlan]) -> int:
    """Commit the missing shards of `images` and of crops; returns the number of images that were missing.

    Raises UserError if the source or the cache cannot be used.
    """
    parts = all_parts(splits)
    images = {(part.key, shard) for split in splits for part, shard in split.dataset.missing_images()}
    crops = {(part.key, shard) for split in splits for part, shard in split.dataset.missing_crops()}
    lacking, rows = defaultdict[str, list[int]](list), list[dict[str, Any]]()
    for key, shard in sorted(images | crops):
        lacking[key].append(shard)
    for split in splits:
        for part in split.dataset.parts:
            if mine := lacking.pop(part.key, None):
                samples = split.listing.samples(part.id)
                rows += [ingest_row(split.split, part, shard, samples) for shard in mine]
    return _ingest(rows, parts, {split.split: split.source for split in splits}, images)


def _ingest(
    rows: Sequence[dict[str, Any]],
    parts: Mapping[str, Part],
    sources: Mapping[str, Source],
    lost: Collection[tuple[str, int]] | None = None,
) -> int:
    """Commit the shards of these rows; returns the number of images in them, or in those that are `lost`."""
    ingest = Ingest(parts, sources)
    for _ in finished_shards(lambda rows: run_tasks(rows, ingest), rows, parts, "index"):
        pass
    refresh(parts, rows)
    counted = (row for row in rows if lost is None or (row["part"], row["shard"]) in lost)
    return sum(parts[row["part"]].shard_rows(row["shard"]) for row in counted)


def _extract(plan: CachePlan, batch_size: int, report: BuildReport) -> None:
    for _ in range(PASSES):
        if missing := _missing(plan):
            _extract_missing(plan, missing, batch_size, report)
    for name, left in _missing(plan).items():
        raise UserError(f"{len(left)} shards of {name} were not committed, first {left[0]}: run the job again")


def _missing(plan: CachePlan) -> dict[str, list[tuple[str, int]]]:
    """Missing shards, as part and number, by teacher id, without the teachers that lack none."""
    found = {
        teacher.id: dict.fromkeys((part.key, shard) for split in plan.splits for part, shard in split.missing(teacher))
        for teacher in plan.teachers
    }
    return {name: [*shards] for name, shards in found.items() if shards}


def _extract_missing(
    plan: CachePlan, missing: Mapping[str, Sequence[tuple[str, int]]], batch_size: int, report: BuildReport
) -> None:
    needed = [teacher for teacher in plan.teachers if teacher.id in missing]
    shards = [*dict.fromkeys(shard for lacking in missing.values() for shard in lacking)]
    parts, basis = all_parts(plan.splits), [(part.key, shard) for part, shard in plan.splits[0].dataset.shards]
    rows = [{"part": part, "shard": shard} for part, shard in shards]
    label = f"extract {' '.join(teacher.spec.name for teacher in needed)}"
    started = time.perf_counter()
    stages: defaultdict[str, float] = defaultdict(float)
    finished = finished_shards(
        lambda rows: extract_shards(rows, (parts, basis, needed), batch_size), rows, parts, label
    )
    for number, row in enumerate(finished, 1):
        report.shards_computed += row["computed"]
        report.images_extracted += row["images"]
        for stage, seconds in json.loads(row["stages"]).items():
            stages[stage] += seconds
        speed = report.images_extracted / (time.perf_counter() - started)
        todo = len(shards) - number
        export("extract", {"shards": report.shards_computed, "shards_left": todo, "images_per_second": speed})
    refresh(parts, rows, needed)
    if reason := starved(stages, time.perf_counter() - started, gpus()):
        log.warning(reason)


def refresh(
    parts: Mapping[str, Part], rows: Sequence[Mapping[str, Any]], teachers: Sequence[CachedTeacher] = ()
) -> None:
    """Read the records of the parts of these rows again, and write those of complete folders together."""
    for part in (parts[key] for key in dict.fromkeys(row["part"] for row in rows)):
        part.refresh()
        crops = [part.rows] if part.policy.crops else []
        part.write_records([part.teacher(teacher.id) for teacher in teachers] if teachers else [part.images, *crops])
