"""Fine-tuning and evaluation in an MLflow run: curves, metrics, pictures and the model."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.distill.provenance import all_licences, all_teachers
from pipeline.downstream.backbone import check_input_size, find_start
from pipeline.downstream.base import Examples, Report, SoftTeacher, load_task, make_task
from pipeline.downstream.commits import log_commit
from pipeline.downstream.config import EvaluateModelJobConfig, FinetuneJobConfig
from pipeline.downstream.images import refuse_other_classes, refuse_same_images
from pipeline.downstream.pictures import write_report
from pipeline.downstream.saved import SavedModel, find_model, finished_model, load_model
from pipeline.downstream.training import FinetuneJob, FinetuneTask, build_model, epoch_steps
from pipeline.errors import UserError
from pipeline.runs.disk import RELEASED, checkpoint_folder
from pipeline.runs.folder import work_folder
from pipeline.sources.locations import SAMPLES, absolute
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import save_encoder
from pipeline.student.nearest import nearest_folders
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.models import log_model_folder
from pipeline.tracking.run import Run
from pipeline.training.checkpoint import load_state
from pipeline.training.ray_train import fit
from pipeline.training.worker import ALONE

TEACHER_FOLDER = "soft-teacher"
"""Folder of a run from which workers load the teacher of soft targets."""


@dataclass(frozen=True)
class FinetunePlan:
    """Checked data, initial backbone, teacher of soft targets, steps per epoch, and notes on the data."""

    train: Examples
    val: Examples | None
    start: LoadedStudent
    teacher: SoftTeacher | None
    steps: int
    notes: list[str]

    def settled(self, config: FinetuneJobConfig) -> FinetuneJobConfig:
        """The configuration with the batch size that suits the training images, if none is given."""
        return config.model_copy(update={"train": config.train.for_images(len(self.train))})


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning gave: metrics on held-out images (empty if there are none), and the saved model.

    Attributes:
        samples: images seen.
        held_out: identity of the held-out images, or "".
        lineage: origin of the model, by tag.
    """

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    samples: int
    model_uri: str
    model: Path
    held_out: str
    lineage: dict[str, str]


def plan_finetune(config: FinetuneJobConfig) -> FinetunePlan:
    """Open and check everything that fine-tuning needs.

    Raises:
        UserError: naming the first bad file or field.
    """
    task = make_task(config)
    tracking_uri = resolve_uri(config.tracking.uri, work_folder(config))
    start = find_start(config, tracking_uri)
    train = task.open("train")
    assert train is not None
    val = task.open("val", train.classes)
    if len(train.classes) < task.min_classes:
        raise UserError(
            f"data.train ({train.location}) has only one class; finetune.task={task.name} needs "
            f"{task.min_classes} or more"
        )
    if val is not None:
        refuse_same_images(train, val)
        refuse_other_classes(train.classes, val.classes, f"data.train ({train.location})", f"data.val ({val.location})")
    task.build(start.encoder, train.classes)
    check_input_size(start.encoder, task.image_size(), f"finetune.student: {start.name}")
    teacher = task.find_teacher(train.classes, tracking_uri)
    steps = epoch_steps(config, len(train))
    notes = [f"{split}: {note}" for split, data in (("train", train), ("val", val)) if data for note in data.check()]
    return FinetunePlan(train, val, start, teacher, steps, notes)


def finetune(config: FinetuneJobConfig, plan: FinetunePlan, run: Run, folder: Path) -> FinetuneResult:
    """Train, from the last checkpoint below `folder` if there is one, and log curves, tables, pictures and the model.

    Raises:
        UserError: if an image cannot be read.
        DivergedError: if the loss is not finite.
    """
    config = plan.settled(config)
    held_out = log_lineage(plan.train, plan.val, run)
    run.set_student_run(plan.start.provenance.get("run_id"))
    # Exported, so that workers neither download nor draw weights.
    save_encoder(plan.start.encoder, plan.start.name, plan.start.args, config.student.input_size, folder / "start")
    if plan.teacher:
        plan.teacher.saved.save(folder / TEACHER_FOLDER)
    job = FinetuneJob(with_absolute_paths(config), folder / "start", folder)
    checkpoints = checkpoint_folder(config.train, folder, "train")
    checkpoint = fit(make_finetune_task, {"job": job}, config.train, checkpoints, partial(log_commit, run))
    with checkpoint.as_directory() as directory:
        state = load_state(directory)
    if not config.train.keep_finished:
        run.set_tags({"checkpoint": RELEASED})
    model = build_model(job, plan.train.classes)
    model.load_state_dict(state["ema"])
    before, after = state["evaluations"][0][1], state["evaluations"][-1][1]
    position = state["position"]
    origin = provenance(plan, config, run, position["samples"], after)
    finished_model(model, job, plan.train.classes, origin).save(folder / "model")
    if (folder / "evaluation").is_dir():
        for shown in filter(None, (run, run.parent)):
            shown.log_folder(folder / "evaluation", "evaluation")
    tags = {"task": job.task.name, "student": config.finetune.student or config.student.name}
    final = {f"final/{name}": value for name, value in after.items()}
    uri = log_model_folder(run, folder / "model", name=job.task.name, metrics=final, tags=tags)
    step, samples, source = position["step"], position["samples"], lineage(origin, tags["student"])
    return FinetuneResult(before, after, step, samples, uri, folder / "model", held_out, source)


def make_finetune_task(payload: dict[str, Any], rank: int, world: int) -> FinetuneTask:
    """The task of one Ray Train worker; `payload["job"]` is the job."""
    job: FinetuneJob = payload["job"]
    teacher = job.folder / TEACHER_FOLDER
    softener = job.task.make_softener(load_model(teacher).model) if teacher.is_dir() else None
    return FinetuneTask(job, rank, world, softener)


def provenance(
    plan: FinetunePlan, config: FinetuneJobConfig, run: Run, samples: int, metrics: dict[str, float]
) -> dict[str, Any]:
    """JSON-ready origin of a fine-tuned model: its student's, with the data, budget and metrics of this run."""
    teacher = plan.teacher
    return {
        "run_id": run.run_id,
        "student": dict(plan.start.provenance),
        "data": [{"location": plan.train.location, "images": len(plan.train), "classes": len(plan.train.classes)}],
        "training": {"epochs": config.train.epochs, "samples_seen": samples},
        **({"soft_targets": {"teacher": teacher.source, **teacher.saved.provenance}} if teacher else {}),
        "metrics": metrics,
    }


def with_absolute_paths(config: FinetuneJobConfig) -> FinetuneJobConfig:
    """The configuration with absolute paths, for workers in other working directories."""
    changed = {}
    task = make_task(config)
    for section, fields in {"data": ("train", "val"), task.name: task.locations}.items():
        given = getattr(config, section)
        own = [name for name in fields if (section, name) != ("data", "val") or not config.data.share]
        paths = {name: absolute(path) for name in own if (path := getattr(given, name)) not in (None, SAMPLES)}
        changed[section] = given.model_copy(update=paths)
    return config.model_copy(update=changed)


def lineage(origin: Mapping[str, Any], student: str) -> dict[str, str]:
    """Tags of a registered model: its student, the student's teachers, and the images."""
    before = {"student": origin["student"]}
    images = ", ".join(f"{data['images']} of {data['location']}" for data in origin["data"])
    known = {
        "teachers": ", ".join(dict.fromkeys(teacher["name"] for teacher in all_teachers(before))),
        "licences": ", ".join(all_licences(before)),
        "distilled_in": str(origin["student"].get("run_id", "")),
    }
    return {"student": student, "images": images, **{name: value for name, value in known.items() if value}}


def log_lineage(train: Examples | None, val: Examples | None, run: Run) -> str:
    """Log the data sets by a digest of their sample ids; returns the identity of the held-out one, or ""."""
    held_out = ""
    for context, data in (("train", train), ("val", val)):
        if data is not None:
            keys = "\n".join(data.key(row) for row in range(len(data)))
            identity = hashlib.sha256(keys.encode()).hexdigest()
            run.log_dataset(f"{context}-{len(data)}", data.location, identity, context)
            if context == "val":
                held_out = f"val-{len(data)}-{identity[:8]}"
    return held_out


def open_model(config: EvaluateModelJobConfig) -> SavedModel:
    """The model that `evaluate.model` names.

    Raises:
        UserError: if it is not given, does not exist, or was made for another task than `finetune.task`.
    """
    name = config.evaluate.model
    if not name:
        raise UserError("evaluate.model must be given: the folder or MLflow model URI that jobs/finetune.py printed")
    saved = find_model(name, resolve_uri(config.tracking.uri, work_folder(config)))
    if saved is None:
        raise UserError(f"evaluate.model: {name} is not a fine-tuned model{nearest_folders(name, ['model'])}")
    if saved.task.name != (asked := load_task(config.finetune.task).name):
        raise UserError(f"evaluate.model: {name} was made for {saved.task.name}, not for {asked}")
    return saved


def as_saved(config: EvaluateModelJobConfig, saved: SavedModel, given: Collection[str]) -> EvaluateModelJobConfig:
    """The configuration with the settings saved with a model, except for the fields that the user has set."""
    changed = {}
    for section, fields in saved.task.saved_settings().items():
        kept = {name: value for name, value in fields.items() if not {section, f"{section}.{name}"} & set(given)}
        changed[section] = getattr(config, section).model_copy(update=kept)
    return config.model_copy(update=changed)


def open_held_out(config: FinetuneJobConfig, saved: SavedModel) -> Examples:
    """Held-out images with the classes of the model, to be checked."""
    val = make_task(config).open("val", saved.classes)
    if val is None:
        raise UserError("data.val: evaluation needs held-out images")
    refuse_other_classes(saved.classes, val.classes, "evaluate.model", f"data.val ({val.location})")
    return val


def evaluate_model(config: EvaluateModelJobConfig, saved: SavedModel, val: Examples, run: Run, folder: Path) -> Report:
    """Evaluate a saved model on held-out images, and log metrics, tables and pictures."""
    model = saved.model.to("cuda" if torch.cuda.is_available() else "cpu")
    report = make_task(config).evaluate(model, val, ALONE)
    write_report(report, folder / "evaluation", val.classes)
    log_lineage(None, val, run)
    run.log_metric_dict(report.metrics)
    run.log_folder(folder / "evaluation", "evaluation")
    run.set_tags({"model": str(config.evaluate.model)})
    run.set_student_run(saved.student_run)
    return report
