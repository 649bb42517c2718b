"""Fill the cache under an MLflow run, and log its contents and lineage."""

from __future__ import annotations

import logging

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import BuildReport, CachePlan, build_cache
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_fidelity
from pipeline.tracking.run import Run

log = logging.getLogger(__name__)


def precompute(config: CacheJobConfig, plan: CachePlan, run: Run) -> tuple[CachePlan, BuildReport]:
    """Compute what is missing and log it to `run`.

    If nothing is missing, the work metrics that an earlier start of the run has logged stay.

    Returns:
        The plan with the teachers' weight digests, and a report.
    """
    log_lineage(plan, run)
    plan, report = build_cache(plan, config)
    log_quarantine(report, run)
    for split in plan.splits:
        for teacher in plan.teachers:
            folder = split.dataset.teacher(teacher.id)
            records = split.dataset.records(folder).values()
            manifest = "\n".join(f"{r.shard}\t{r.file}\t{r.rows}\t{r.bytes}\t{r.sha256}" for r in records)
            run.log_text(f"shard\tfile\trows\tbytes\tsha256\n{manifest}\n", f"manifests/{split.split}/{teacher.id}.tsv")
            run.log_text(folder.store.get("teacher.json").decode(), f"teachers/{teacher.id}.json")
            run.log_dict(teacher_fidelity(split.dataset, teacher), f"fidelity/{split.split}/{teacher.id}.json")
    quarantined = sum(len(bad) for bad in report.quarantined.values())
    run.log_metric_dict({"quarantined": quarantined, "cache_bytes": float(cache_bytes(plan))})
    if report.images_ingested or report.shards_computed:
        log_work(report, run)
    return plan, report


def log_work(report: BuildReport, run: Run) -> None:
    """Log what was computed, and how fast."""
    run.log_metric_dict(
        {
            "shards_computed": report.shards_computed,
            "images_ingested": report.images_ingested,
            "images_extracted": report.images_extracted,
            "images_per_second": report.images_extracted / report.seconds,
            "seconds": report.seconds,
        }
    )


def log_lineage(plan: CachePlan, run: Run) -> None:
    """Log datasets and teachers by their content-addressed ids, and tag untrained teachers."""
    for split in plan.splits:
        dataset = split.dataset
        run.log_dataset(dataset.id, dataset.location, dataset.fingerprint, split.split)
    run.set_tags({f"teacher.{number}": teacher.id for number, teacher in enumerate(plan.teachers)})
    untrained = [teacher.spec.name for teacher in plan.teachers if is_untrained(teacher)]
    if untrained:
        run.set_tags({"untrained_teachers": ", ".join(untrained)})


def is_untrained(teacher: CachedTeacher) -> bool:
    """Whether the teacher's weights are random."""
    return teacher.spec.weights.startswith("random")


def log_quarantine(report: BuildReport, run: Run) -> None:
    """Log every image that was left out, also as an artifact."""
    for split, bad in report.quarantined.items():
        for sample in bad:
            log.warning("quarantined %s image %s: %s", split, sample["sample_id"], sample["reason"])
    if any(report.quarantined.values()):
        run.log_dict(dict(report.quarantined), "quarantine.json")


def cache_bytes(*plans: CachePlan) -> int:
    """Bytes of the teacher shards that these plans use."""
    pairs = [(split.dataset, teacher.id) for plan in plans for split in plan.splits for teacher in plan.teachers]
    folders = {dataset.teacher(name).store.uri: dataset.records(dataset.teacher(name)) for dataset, name in pairs}
    return sum(record.bytes for records in folders.values() for record in records.values())
