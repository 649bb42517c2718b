"""Fill the cache under an MLflow run, and log its contents and lineage."""

import logging

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import BuildReport, CachePlan, build_cache
from pipeline.cache.layout.cached_teacher import teacher_fidelity
from pipeline.tracking.run import Run

log = logging.getLogger(__name__)


def precompute(config: CacheJobConfig, plan: CachePlan, run: Run) -> tuple[CachePlan, BuildReport]:
    """Compute what is missing, log it to `run`, and return what `build_cache` returns.

    If nothing is missing, the work metrics that an earlier start of the run has logged stay.
    """
    for split in plan.splits:
        dataset = split.dataset
        run.log_dataset(dataset.id, dataset.location, dataset.fingerprint, split.split)
    run.set_tags({f"teacher.{number}": teacher.id for number, teacher in enumerate(plan.teachers)})
    if untrained := [teacher.spec.name for teacher in plan.teachers if teacher.spec.weights.startswith("random")]:
        run.set_tags({"untrained_teachers": ", ".join(untrained)})
    plan, report = build_cache(plan, config)
    for name, bad in report.quarantined.items():
        for sample in bad:
            log.warning("quarantined %s image %s: %s", name, sample["sample_id"], sample["reason"])
    if any(report.quarantined.values()):
        run.log_dict(report.quarantined, "quarantine.json")
    for split in plan.splits:
        for teacher in plan.teachers:
            dataset = split.dataset
            folder = dataset.teacher(teacher.id)
            rows = [f"{r.shard}\t{r.file}\t{r.rows}\t{r.bytes}\t{r.sha256}\n" for r in dataset.records(folder).values()]
            manifest = "".join(["shard\tfile\trows\tbytes\tsha256\n", *rows])
            run.log_text(manifest, f"manifests/{split.split}/{teacher.id}.tsv")
            run.log_text(folder.store.get("teacher.json").decode(), f"teachers/{teacher.id}.json")
            run.log_dict(teacher_fidelity(dataset, teacher), f"fidelity/{split.split}/{teacher.id}.json")
    quarantined = sum(len(bad) for bad in report.quarantined.values())
    run.log_metric_dict({"quarantined": quarantined, "cache_bytes": float(cache_bytes(plan))})
    if report.images_ingested or report.shards_computed:
        names = ("shards_computed", "images_ingested", "images_extracted", "seconds")
        speed = {"images_per_second": report.images_extracted / report.seconds}
        run.log_metric_dict({name: getattr(report, name) for name in names} | speed)
    return plan, report


def cache_bytes(*plans: CachePlan) -> int:
    """Bytes of the teacher shards that these plans use."""
    pairs = [(split.dataset, teacher.id) for plan in plans for split in plan.splits for teacher in plan.teachers]
    records = {dataset.teacher(name).store.uri: dataset.records(dataset.teacher(name)) for dataset, name in pairs}
    return sum(record.bytes for of_folder in records.values() for record in of_folder.values())
