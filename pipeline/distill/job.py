"""Distillation under an MLflow run: train from the cache, log the curves and the student."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pipeline.cache.fill.plan import CachePlan
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.codec import Codec
from pipeline.cache.read.order import check_per_step
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import feature_map_size
from pipeline.distill.figures import FigureWriter
from pipeline.distill.grid import GridRule
from pipeline.distill.kept_heads import save_heads
from pipeline.distill.loss import check_losses
from pipeline.distill.phases import Phase, PhaseState, start_file
from pipeline.distill.provenance import lineage, provenance
from pipeline.distill.task import DistillJob, build_distiller, build_reader, build_student, make_distill_task
from pipeline.errors import UserError, one_line
from pipeline.evaluate.knn import teacher_knn
from pipeline.student.cost import inference_cost
from pipeline.student.model import Encoder, save_encoder
from pipeline.tracking.models import log_student
from pipeline.tracking.run import Run
from pipeline.training.checkpoint import STATE_FILE, checkpoint_folder, load_state
from pipeline.training.ray_train import count_shares, fit
from pipeline.training.task import History, check_best_metric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult:
    """What a distillation gave: kNN accuracies in percent on held-out images (None without labels), and the exported student.

    Attributes:
        samples: images seen.
        held_out: identity of the images that kNN was measured on, or "".
        lineage: tags of the registered student.
    """

    knn_before: float | None
    knn_after: float | None
    teacher_knn: dict[str, float]
    steps: int
    samples: int
    model_uri: str
    student: Path
    held_out: str
    lineage: dict[str, str]


def views_per_epoch(phase: Phase) -> int:
    """Views of an epoch, if no image is quarantined; raises a UserError if they do not fill one batch."""
    train = phase.plan.split("train")
    assert train is not None
    images, batch = train.images * train.dataset.policy.rows_per_image, phase.config.train.batch_size
    if images < batch:
        raise UserError(
            f"train.batch_size={batch} is more than the {images} views of {train.dataset.location}; lower it"
        )
    return images


def training_plan(phase: Phase) -> dict[str, str]:
    """Readable rows on student, training and grids; raises a UserError if training would be refused."""
    config, teachers = phase.config, phase.plan.teachers
    check_losses(config.loss)
    share = config.train.batch_size // max(1, config.train.most_workers)
    check_per_step(config.views.per_step, config.views.crops or 1, share)
    check_best_metric(config.train.best_metric, _evaluated(phase.plan))
    if config.loss.standardise == "phi_s":
        _warn_of_projections(teachers)
    student = build_student(config)
    views = views_per_epoch(phase)
    grid, labels = feature_map_size(student, config.student.input_size), teacher_labels(teachers)
    strides = ", ".join(map(str, student.tap_strides))
    rows = {
        "student": f"{config.student.name} at {config.student.input_size} px, feature maps of strides {strides}",
        **({"start": f"weights of {config.student.weights}"} if phase.start else {}),
        "training": config.train.describe_epochs(views, views // config.train.batch_size),
        "learning rate": config.train.lr_rule,
        "kNN": f"{config.knn.k} neighbours" if _labelled(phase.plan) else f"none: {_lacking(phase.plan)}",
    }
    return rows | {f"grid {labels[t.id]}": str(GridRule(grid, t.spec.grid)) for t in teachers}


def _warn_of_projections(teachers: Sequence[CachedTeacher]) -> None:
    labels = teacher_labels(teachers)
    if chosen := [labels[teacher.id] for teacher in teachers if Codec.parse(teacher.codec).pca]:
        log.warning(
            "loss.standardise=phi_s: what the cache keeps of %s was chosen for mean_std; with a few channels of large deviation "
            "it keeps less of these targets than the plan says: set cache.codec=int8 or float16",
            ", ".join(chosen),
        )


def check_session(phase: Phase) -> None:
    """Raise a UserError if the GPUs of this Ray session do not divide the batch, or each would get too few images."""
    config = phase.config
    share = config.train.batch_size // count_shares(config.train)
    check_per_step(config.views.per_step, config.views.crops or 1, share)


def _evaluated(plan: CachePlan) -> list[str]:
    """Names of the metrics that `DistillTask` will evaluate."""
    if plan.split("val") is None:
        return []
    labels = teacher_labels(plan.teachers)
    parts = [f"{labels[teacher.id]}/{kind}" for teacher in plan.teachers for kind in teacher.shapes]
    names = [f"val_{measure}/{part}" for measure in ("cosine", "loss") for part in parts]
    return ["knn", "knn_raw", *names] if _labelled(plan) else names


def _labelled(plan: CachePlan) -> bool:
    labelled = [split.labelled for split in plan.splits]
    return len(labelled) > 1 and all(labelled)


def _lacking(plan: CachePlan) -> str:
    return "the images have no labels" if plan.split("val") else "data.val names no held-out images"


def distill(phases: Sequence[Phase], run: Run, folder: Path) -> DistillResult:
    """Train on complete caches, phase after phase, from the last checkpoint below `folder` if there is one.

    Raises:
        UserError: if the data is too small for the batch or the splits do not fit together.
        DivergedError: if the loss is not finite.
    """
    first, file = phases[0], start_file(folder)
    if first.start and not file.exists():
        PhaseState.before(build_student(first.config), first.start, first.config.student.weights).save(file)
    state, file_before = (PhaseState.load(file), file) if file.exists() else (PhaseState(), None)
    teachers: dict[str, float] = {}
    jobs = []
    for number, phase in enumerate(phases, 1):
        name = "train" if len(phases) == 1 else f"train/phase-{number}"
        file = folder / f"{name}.pt"
        job = make_job(phase.config, phase.plan)
        jobs.append(job)
        teachers |= evaluate_teachers(job, run, state.steps)
        if not file.exists():
            if len(phases) > 1:
                print(f"phase {number} of {len(phases)}", flush=True)
            figures = FigureWriter(str(folder / "figures"), teachers, state.evaluations)
            checkpoints = checkpoint_folder(phase.config.train, folder, name)
            state = _train(job, run, checkpoints, state, file_before, figures)
            state.save(file)
        state, file_before = PhaseState.load(file), file
    return _finish(jobs, run, folder, state, teachers)


def _train(
    job: DistillJob, run: Run, folder: str, before: PhaseState, file_before: Path | None, figures: FigureWriter
) -> PhaseState:
    # The order of an epoch is known before anything is read.
    quality = build_reader(job, 0, max(1, job.config.train.most_workers)).shuffle_quality()
    run.log_metrics([(before.steps, {f"shuffle/{name}": value for name, value in asdict(quality).items()})])
    print(f"shuffle: {quality}", flush=True)
    payload = {"job": job, "before": file_before and str(file_before), "figures": figures}
    # Without weights, since it is pickled for Ray Train's controller.
    on_commit = partial(_log_commit, run, replace(before, weights=None), Path(figures.folder))
    checkpoint = fit(make_distill_task, payload, job.config.train, folder, on_commit)
    with checkpoint.as_directory() as directory:
        state = load_state(directory)
        location = f"{folder}/{Path(checkpoint.path).name}/{STATE_FILE}"
        run.log_reference(Path(directory, STATE_FILE), location, "checkpoint/reference.json")
    return before.then(state, job.config.train.epochs, list(teacher_labels(job.teachers).values()))


def _finish(
    jobs: Sequence[DistillJob], run: Run, folder: Path, state: PhaseState, teachers: dict[str, float]
) -> DistillResult:
    """Export the student of the last phase, and log it."""
    job, config = jobs[-1], jobs[-1].config.student
    distiller = build_distiller(job)
    assert state.weights is not None
    distiller.load_state_dict(state.weights)
    encoder, student = distiller.student.encoder, folder / "student"
    save_encoder(encoder, config.name, config.args, config.input_size, student)
    if config.keep_heads:
        save_heads(distiller, config.head_dim, student)
    before, after = state.knn or (None, None)
    run.log_metric_dict(_size(encoder, config.input_size))
    origin = provenance(jobs, run.run_id, state.samples, {"knn": after, **teachers}, state.origin)
    (student / "provenance.json").write_text(json.dumps(origin, indent=2), encoding="utf-8")
    run.log_folder(student, "student")
    example = torch.zeros(2, 3, config.input_size, config.input_size)
    metrics = {} if after is None else {"knn_after": after}
    # MLflow reads an artifact folder of a run as the run's model of that name, and `student` is such a folder.
    uri = log_student(run, encoder.eval(), example, name="encoder", metrics=metrics, tags={"model": config.name})
    held_out = job.val.id if job.val else ""
    tags = lineage(jobs, origin)
    return DistillResult(before, after, teachers, state.steps, state.samples, uri, student, held_out, tags)


def _size(encoder: Encoder, input_size: int) -> dict[str, float]:
    """Parameters and multiply-accumulates of the inference form; nothing if they cannot be counted."""
    try:
        counted = inference_cost(encoder, input_size)
    except (RuntimeError, AssertionError) as error:
        log.warning("parameters and MACs are not logged: %s", one_line(error))
        return {}
    return {"parameters": counted.parameters, "macs": counted.macs}


def _log_commit(run: Run, before: PhaseState, figures: Path, history: History, checkpoint: str | None) -> None:
    run.log_metrics(before.shift(history))
    if any("loss" not in metrics for _, metrics in history):
        for figure in sorted(figures.glob("[!.]*.png")):
            run.log_file(figure, "figures")
    if checkpoint:
        run.set_tags({"checkpoint": checkpoint})


def make_job(config: DistillJobConfig, plan: CachePlan) -> DistillJob:
    """The job on a complete cache, with the rotations of PHI-S if the loss standardises by them.

    If held-out images have no labels, it logs a warning and measures no kNN.
    """
    train, val = plan.split("train"), plan.split("val")
    assert train is not None
    held_out = val.dataset if val else None
    if config.loss.standardise == "phi_s":
        for teacher in plan.teachers:
            freeze_phi_s(train.dataset, teacher)
    labelled = held_out if held_out and train.dataset.labelled and held_out.labelled else None
    if held_out and not labelled:
        log.warning("no kNN: data.train or data.val has no labels")
    return DistillJob(config, train.dataset, labelled, plan.teachers, held_out)


def evaluate_teachers(job: DistillJob, run: Run, step: int) -> dict[str, float]:
    """Every teacher's own kNN accuracy in percent, from the cache."""
    if job.val is None:
        return {}
    labels = teacher_labels(job.teachers)
    scores = {labels[t.id]: teacher_knn(t, job.train, job.val, job.config.knn) for t in job.teachers}
    run.log_metrics([(step, {f"teacher_knn/{name}": score for name, score in scores.items()})])
    return scores
