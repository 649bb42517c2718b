"""Fill the cache under an MLflow run, and log its contents and lineage."""

import itertools
import logging

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import BuildReport, build_cache
from pipeline.cache.fill.plan import CachePlan
from pipeline.cache.layout.cached_teacher import teacher_fidelity, teacher_labels
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import record_use
from pipeline.cache.layout.part import teacher_home
from pipeline.cache.layout.target import TARGET_COSINE, TARGET_COSINE_P1, keeps_target
from pipeline.errors import UserError
from pipeline.tracking.run import Run

log = logging.getLogger(__name__)


def precompute(config: CacheJobConfig, plan: CachePlan, run: Run) -> tuple[CachePlan, BuildReport]:
    """Compute what is missing, log it to `run`, and return what `build_cache` returns.

    If nothing is missing, the work metrics that an earlier start of the run has logged stay.
    """
    run.set_tags({f"teacher.{number}": teacher.id for number, teacher in enumerate(plan.teachers)})
    if untrained := [teacher.spec.name for teacher in plan.teachers if teacher.spec.weights.startswith("random")]:
        run.set_tags({"untrained_teachers": ", ".join(untrained)})
    plan, report = build_cache(plan, config)
    log_images(plan, run)
    for name, bad in report.quarantined.items():
        for sample in bad:
            log.warning("quarantined %s image %s: %s", name, sample["sample_id"], sample["reason"])
    if any(report.quarantined.values()):
        run.log_dict(report.quarantined, "quarantine.json")
    for split in plan.splits:
        for teacher in plan.teachers:
            records = split.dataset.records(teacher.id)
            rows = [f"{p.id}\t{r.shard}\t{r.file}\t{r.rows}\t{r.bytes}\t{r.sha256}\n" for p, r in records]
            manifest = "".join(["part\tshard\tfile\trows\tbytes\tsha256\n", *rows])
            run.log_text(manifest, f"manifests/{split.split}/{teacher.id}.tsv")
            run.log_dict(teacher_fidelity(split.dataset, teacher), f"fidelity/{split.split}/{teacher.id}.json")
    for teacher in plan.teachers:
        description = teacher_home(plan.store, teacher.id).get("teacher.json").decode()
        run.log_text(description, f"teachers/{teacher.id}.json")
    warn_of_losses(plan)
    quarantined = sum(len(bad) for bad in report.quarantined.values())
    run.log_metric_dict({"quarantined": quarantined, "cache_bytes": float(cache_bytes(plan))})
    if report.images_read or report.shards_computed:
        names = ("shards_computed", "images_read", "images_ingested", "images_extracted", "seconds")
        speed = {"images_per_second": report.images_extracted / report.seconds}
        run.log_metric_dict({name: getattr(report, name) for name in names} | speed)
    return plan, report


def warn_of_losses(plan: CachePlan) -> None:
    """Log a warning for every teacher of which the stored features keep too little of the target."""
    labels = teacher_labels(plan.teachers)
    for split, (number, teacher) in itertools.product(plan.splits, enumerate(plan.teachers)):
        name = f"{split.split} features of {labels[teacher.id]}"
        for kind, figures in teacher_fidelity(split.dataset, teacher).items():
            if keeps_target(figures):
                continue
            summaries = split.dataset.summaries(teacher.id)
            lost = sum(part.rows for part in summaries if not keeps_target(part.fidelity.get(kind, {})))
            views = sum(part.rows for part in summaries)
            remedy = (
                f"a new name in teachers.{number}.basis fits it on today's images and stores all features anew, beside these"
                if Codec.parse(teacher.codec).pca
                else "another cache.codec is stored beside it"
            )
            added = f"; that is {lost} of {views} views, on which it was not chosen: {remedy}"
            log.warning(
                "%s: %s keeps a cosine of %.3f of the standardised %s, 1st percentile %.3f (wanted: %g and %g)%s",
                *(name, teacher.codec, figures["target_cosine"], kind, figures["target_cosine_p1"]),
                *(TARGET_COSINE, TARGET_COSINE_P1, added if lost < views else ""),
            )


def log_images(plan: CachePlan, run: Run) -> None:
    """Log the data sets of a plan as the inputs of a run."""
    for split in plan.splits:
        dataset = split.dataset
        try:
            record_use(dataset, run.run_id)
        except UserError as error:  # a complete cache may be read-only
            log.warning("the cache does not note this run: %s", error)
        run.log_dataset(dataset.id, dataset.location, dataset.fingerprint, split.split)


def cache_bytes(*plans: CachePlan) -> int:
    """Bytes of all files of the teachers of these plans: features, statistics, records and projections."""
    pairs = [*itertools.chain.from_iterable(itertools.product(plan.splits, plan.teachers) for plan in plans)]
    stores = {part.teacher(teacher.id).store for split, teacher in pairs for part in split.dataset.parts}
    stores |= {split.dataset.statistics(teacher.id) for split, teacher in pairs}
    stores |= {teacher_home(split.dataset.cache, teacher.id) for split, teacher in pairs}
    return sum(store.bytes_below() for store in stores)


def image_bytes(*plans: CachePlan) -> int:
    """Bytes of all other files of the data sets and parts of these plans: images, keys, crops, names and labels."""
    datasets = [split.dataset for plan in plans for split in plan.splits]
    parts = [part for dataset in datasets for part in dataset.parts]
    whole = {store for part in parts for store in (part.images.store, part.rows.store)}
    around = {store for part in parts for store in (part.store, part.view)} | {dataset.store for dataset in datasets}
    return sum(store.bytes_below() for store in whole) + sum(sum(store.files().values()) for store in around)
