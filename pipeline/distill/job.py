"""Distillation under an MLflow run: train from the cache, log the curves and the student."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.cache.build import CachePlan
from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import teacher_labels
from pipeline.config import Config
from pipeline.distill.distiller import token_grid
from pipeline.distill.grid import GridRule
from pipeline.distill.task import DistillJob, build_distiller, build_reader, build_student, make_distill_task
from pipeline.errors import UserError
from pipeline.evaluate.knn import check_classes, has_labels, teacher_knn
from pipeline.student.model import Encoder, save_encoder
from pipeline.tracking import Run, log_student
from pipeline.training import STATE_FILE, History, fit, load_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult:
    """What a distillation gave.

    Attributes:
        knn_before, knn_after: accuracy in percent of the student on held-out images, or None without labels.
        teacher_knn: of every teacher's cached features, in percent.
        steps, samples: optimiser steps and images seen.
        model_uri: of the student in MLflow.
        student: folder of the exported student.
    """

    knn_before: float | None
    knn_after: float | None
    teacher_knn: dict[str, float]
    steps: int
    samples: int
    model_uri: str
    student: Path


def steps_per_epoch(config: Config, plan: CachePlan) -> int:
    """Optimiser steps of an epoch, if no image is quarantined.

    Raises:
        UserError: where the images do not fill one batch.
    """
    train = plan.split("train")
    assert train is not None
    images, batch = train.dataset.count * train.dataset.policy.rows_per_image, config.train.batch_size
    if images < batch:
        raise UserError(
            f"train.batch_size={batch} is more than the {images} views of {train.dataset.location}; lower it"
        )
    return images // batch


def grid_rules(config: Config, plan: CachePlan) -> dict[str, str]:
    """How the student's tokens meet every teacher's patches, in words."""
    grid = token_grid(build_student(config), config.student.input_size)
    labels = teacher_labels(plan.teachers)
    return {labels[teacher.id]: str(GridRule(grid, teacher.spec.grid)) for teacher in plan.teachers}


def distill(config: Config, plan: CachePlan, run: Run, folder: Path) -> DistillResult:
    """Train on a complete cache, from the last checkpoint below `folder` if there is one.

    Raises:
        UserError: where the data is too small for the batch or the splits do not fit together.
        DivergedError: where the loss is not finite.
    """
    job = make_job(config, plan)
    log_shuffle(job, run)
    teachers = evaluate_teachers(job, run)
    checkpoint = fit(make_distill_task, {"job": job}, config.train, str(folder / "train"), partial(_log_commit, run))
    with checkpoint.as_directory() as directory:
        state = load_state(directory)
        run.log_file(Path(directory, STATE_FILE), "checkpoint")
    distiller = build_distiller(job)
    distiller.load_state_dict(state["ema"])
    curve = [metrics["knn"] for _, metrics in state["evaluations"] if "knn" in metrics]
    before, after = (curve[0], curve[-1]) if curve else (None, None)
    encoder = distiller.student.encoder
    export_student(encoder, config, folder / "student")
    uri = _log(encoder, config, run, folder / "student", {"knn_after": after} if after is not None else {})
    position = state["position"]
    return DistillResult(before, after, teachers, position["step"], position["samples"], uri, folder / "student")


def log_shuffle(job: DistillJob, run: Run) -> None:
    """How well an epoch is shuffled: its order is known before anything is read."""
    world = max(1, job.config.train.workers)
    quality = build_reader(job, 0, world).shuffle_quality()
    run.log_metric_dict({f"shuffle/{name}": value for name, value in asdict(quality).items()})
    print(f"shuffle: {quality}", flush=True)


def _log_commit(run: Run, history: History, checkpoint: str | None) -> None:
    run.log_metrics(history)
    if checkpoint:
        run.set_tags({"checkpoint": checkpoint})


def make_job(config: Config, plan: CachePlan) -> DistillJob:
    """The job on a complete cache; held-out images without labels are left out, aloud."""
    train, val = plan.split("train"), plan.split("val")
    assert train is not None
    held_out: Dataset | None = None
    if val is not None:
        check_classes(train.dataset, val.dataset)
        if has_labels(train.dataset) and has_labels(val.dataset):
            held_out = val.dataset
        else:
            log.warning("no kNN: data.train or data.val has no labels")
    return DistillJob(config, train.dataset, held_out, plan.teachers)


def evaluate_teachers(job: DistillJob, run: Run) -> dict[str, float]:
    """Every teacher's own kNN accuracy in percent, from the cache."""
    if job.val is None:
        return {}
    labels = teacher_labels(job.teachers)
    scores = {labels[t.id]: teacher_knn(t, job.train, job.val, job.config.knn) for t in job.teachers}
    run.log_metric_dict({f"teacher_knn/{name}": score for name, score in scores.items()})
    return scores


def export_student(encoder: Encoder, config: Config, folder: Path) -> None:
    """Write the backbone for `load_encoder` and timm; neck and heads are dropped."""
    student = config.student
    save_encoder(encoder, student.name, student.args, student.input_size, folder)


def _log(encoder: Encoder, config: Config, run: Run, folder: Path, metrics: dict[str, float]) -> str:
    for name in ("student.safetensors", "student.json"):
        run.log_file(folder / name, "student")
    size = config.student.input_size
    example = torch.zeros(2, 3, size, size)
    return log_student(
        run, encoder.eval(), example, name="student", metrics=metrics, tags={"model": config.student.name}
    )
