"""The resolved plan as text: what is there, what is missing, what it will take."""

from __future__ import annotations

from jobs._cli import size, table
from pipeline.cache.build import CachePlan
from pipeline.cache.codec import Codec
from pipeline.cache.extract import CachedTeacher, projection_of, teacher_labels
from pipeline.config import Config
from pipeline.distill.job import grid_rules, steps_per_epoch
from pipeline.runs import work_folder


def cache_plan(plan: CachePlan, config: Config) -> str:
    """Datasets, teachers, shards and bytes."""
    rows: dict[str, str | None] = {"work folder": str(work_folder(config)), "cache": plan.store.uri}
    for split in plan.splits:
        dataset = split.dataset
        missing = len(split.missing_images())
        there = f"{dataset.id}: {dataset.shards - missing} of {dataset.shards} shards there"
        rows[f"{split.split} images"] = f"{dataset.count} from {dataset.location}; view {dataset.policy.id}; {there}"
    labels = teacher_labels(plan.teachers)
    for teacher in plan.teachers:
        rows[f"teacher {labels[teacher.id]}"] = _teacher(plan, teacher)
    return table(rows)


def _teacher(plan: CachePlan, teacher: CachedTeacher) -> str:
    spec = teacher.spec
    shards = sum(split.dataset.shards for split in plan.splits)
    missing = sum(len(split.missing(teacher)) for split in plan.splits)
    summary = "none" if spec.summary_dim is None else str(spec.summary_dim)
    return (
        f"{spec.input_size[0]}x{spec.input_size[1]} px -> {spec.grid[0]}x{spec.grid[1]}x{spec.patch_dim}, summary {summary}; "
        f"weights {spec.weights[:20]}; {teacher.codec}: {_stored(plan, teacher)}; "
        f"{teacher.id}: {shards - missing} of {shards} shards there"
    )


def _stored(plan: CachePlan, teacher: CachedTeacher) -> str:
    """Bytes of a view of an image and of all; at most, while the number of components is still to be found."""
    folders = [split.dataset.teacher(teacher.id) for split in plan.splits]
    rows = [teacher.row_bytes(projection_of(folder)) for folder in folders]
    codec = Codec.parse(teacher.codec)
    open_ended = codec.zstd or (codec.pca and not all(folder.projection for folder in folders))
    bound = "at most " if open_ended else ""
    views = [split.dataset.count * split.dataset.policy.rows_per_image for split in plan.splits]
    total = sum(count * row for count, row in zip(views, rows, strict=True))
    return f"{bound}{size(rows[0])} a view, {size(total)} total"


def training_plan(plan: CachePlan, config: Config) -> str:
    """Student, grid rules and steps."""
    steps = steps_per_epoch(config, plan)
    rows: dict[str, str | None] = {
        "student": f"{config.student.name} at {config.student.input_size} px",
        "training": f"{config.train.epochs} epochs of {steps} steps of {config.train.batch_size} images",
    }
    rows |= {f"grid {name}": rule for name, rule in grid_rules(config, plan).items()}
    return table(rows)
