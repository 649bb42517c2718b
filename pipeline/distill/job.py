"""Distillation under an MLflow run: train from the cache, log the curves and the student."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.cache.layout.cached_teacher import teacher_labels
from pipeline.distill.commits import log_commit
from pipeline.distill.config import training_names
from pipeline.distill.distiller import Distiller
from pipeline.distill.figures import FigureWriter
from pipeline.distill.kept_heads import save_heads
from pipeline.distill.phases import Phase, PhaseState, start_file
from pipeline.distill.plan import check_images, make_job
from pipeline.distill.provenance import lineage, provenance
from pipeline.distill.task import (
    DistillJob,
    build_distiller,
    build_reader,
    build_student,
    make_distill_task,
)
from pipeline.errors import one_line
from pipeline.evaluate.knn import teacher_knn
from pipeline.runs.disk import RELEASED, checkpoint_folder
from pipeline.student.model import Encoder, save_encoder
from pipeline.tracking.models import log_student
from pipeline.tracking.run import Run
from pipeline.training.checkpoint import STATE_FILE, load_state
from pipeline.training.ray_train import fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult:
    """What a distillation gave: kNN accuracies in percent on held-out images (None without labels), and the exported student.

    Attributes:
        samples: images seen.
        held_out: identity of the images that kNN was measured on, or "".
        lineage: tags of the registered student.
        jobs: one for each phase.
        distiller: of the last phase, trained, with heads.
        cost: parameters and MACs of the student, if they can be counted.
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
    jobs: tuple[DistillJob, ...]
    distiller: Distiller
    cost: dict[str, float]


def distill(phases: Sequence[Phase], run: Run, folder: Path) -> DistillResult:
    """Train on complete caches, phase after phase, from the last checkpoint below `folder` if there is one.

    Raises:
        UserError: if the data is too small for the batch, lacks labels that are needed, or the splits do not fit together.
        DivergedError: if the loss is not finite.
    """
    for phase in phases:  # a plan with unopened archives could not
        check_images(phase)
    first, file = phases[0], start_file(folder)
    if first.start and not file.exists():
        PhaseState.before(build_student(first.config), first.start, first.config.student.weights).save(file)
    state, file_before = (PhaseState.load(file), file) if file.exists() else (PhaseState(), None)
    teachers: dict[str, float] = {}
    jobs = []
    for number, (name, phase) in enumerate(zip(training_names(len(phases)), phases, strict=True), 1):
        file = folder / f"{name}.pt"
        job = make_job(phase.settled, phase.plan, phase.further)
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
    on_commit = partial(log_commit, run, before.start, Path(figures.folder))
    checkpoint = fit(make_distill_task, payload, job.config.train, folder, on_commit)
    with checkpoint.as_directory() as directory:
        state = load_state(directory)
        if job.config.train.keep_finished:
            location = f"{folder}/{Path(checkpoint.path).name}/{STATE_FILE}"
            run.log_reference(Path(directory, STATE_FILE), location, "checkpoint/reference.json")
        else:
            run.set_tags({"checkpoint": RELEASED})
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
    cost = _size(encoder, config.input_size)
    run.log_metric_dict(cost)
    origin = provenance(jobs, run.run_id, state.samples, {"knn": after, **teachers}, state.origin)
    (student / "provenance.json").write_text(json.dumps(origin, indent=2), encoding="utf-8")
    run.log_folder(student, "student")
    example = torch.zeros(2, 3, config.input_size, config.input_size)
    metrics = {} if after is None else {"knn_after": after}
    # MLflow reads an artifact folder of a run as the run's model of that name, and `student` is such a folder.
    uri = log_student(run, encoder.eval(), example, name="encoder", metrics=metrics, tags={"model": config.name})
    held_out = job.val.id if job.val else ""
    tags = lineage(jobs, origin)
    seen = state.steps, state.samples
    return DistillResult(
        before, after, teachers, *seen, uri, student, held_out, tags, tuple(jobs), distiller.eval(), cost
    )


def _size(encoder: Encoder, input_size: int) -> dict[str, float]:
    """Parameters and multiply-accumulates of the inference form; nothing if they cannot be counted."""
    from pipeline.student.cost import inference_cost  # torch imports Triton for its counter

    try:
        counted = inference_cost(encoder, input_size)
    except (RuntimeError, AssertionError) as error:
        log.warning("parameters and MACs are not logged: %s", one_line(error))
        return {}
    return {"parameters": counted.parameters, "macs": counted.macs}


def evaluate_teachers(job: DistillJob, run: Run, step: int) -> dict[str, float]:
    """Every teacher's own kNN accuracy in percent, from the cache."""
    if job.val is None:
        return {}
    labels = teacher_labels(job.teachers)
    scores = {labels[t.id]: teacher_knn(t, job.train, job.val, job.config.knn) for t in job.teachers}
    run.log_metrics([(step, {f"teacher_knn/{name}": score for name, score in scores.items()})])
    return scores
