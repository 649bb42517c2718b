"""The rows of a comparison: each run that trained a student, joined with the runs that evaluated it."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, TypeVar

from pipeline.compare.describe import (
    configuration,
    describe,
    image_set,
    input_size,
    parameter,
    student_arguments,
    student_key,
    timm_student,
)
from pipeline.compare.images import places, unify
from pipeline.compare.latency import find_latencies
from pipeline.compare.measures import WITHOUT_IMAGES, Measure, columns_of, measures_of
from pipeline.downstream.base import Column, DownstreamTask, load_task
from pipeline.downstream.config import TASKS
from pipeline.errors import UserError, one_line
from pipeline.student.cost import inference_cost
from pipeline.student.model import Encoder, create_backbone
from pipeline.tracking.reading import Experiment, LoggedRun

log = logging.getLogger(__name__)

V = TypeVar("V")

Figures = dict[str, dict[str | None, tuple[LoggedRun, float]]]
"""The latest evaluation and its value, by measure and held-out images; the latest is the last."""

JOBS_WITHOUT_STUDENT = ("compare", "precompute", "benchmark")
PROBES = {
    "knn": (Column("knn", "knn", "kNN"),),
    "linear": (Column("top1", "linear", "linear"),),
    "zero-shot": (Column("top1", "zero_shot", "zero-shot"),),
    "retrieval": (Column("text_to_image_r1", "text_to_image_r1", "text to image R@1"),),
    "correspondence": (Column("pck_0.1", "pck", "PCK@0.1"),),
    "seg-probe": (Column("miou", "probe_miou", "mIoU of the probe"),),
    "promptable": (
        Column("mask_iou", "prompts_mask_iou", "mask IoU of prompts"),
        Column("mask_ap", "prompts_mask_ap", "mask AP of prompts"),
    ),
}
"""The metrics of each probe job."""


def is_evaluation(run: LoggedRun) -> bool:
    """Whether a run evaluates or fine-tunes the student of another run."""
    job = run.tags.get("job", "")
    return job in PROBES or job == "finetune" or job.startswith("evaluate-")


@dataclass(frozen=True)
class Point(Generic[V]):
    """kNN in percent after an epoch, of the averaged and the raw weights: of a run, or summarised over the runs of a group."""

    epoch: float
    knn: V | None
    raw: V | None


@dataclass(frozen=True)
class Entry:
    """A row of a comparison.

    Attributes:
        started: milliseconds since 1970.
        link: address of the run in MLflow's web interface, if the store has one.
        report: address of the run's report, if it has one that can be opened here.
        texts: by :data:`~pipeline.compare.measures.TEXTS`.
        measures: by the keys of :attr:`CollectedRuns.all_measures`; unknown ones are missing.
        config: the fields that define its group.
        held_out: the held-out images that all its measures were taken on; None: unknown.
        teacher_knn: kNN of each teacher in percent on these images.
        evaluated_by: names of the finished runs that evaluated or fine-tuned its student.
        unfinished: names of the others.
    """

    run_id: str
    name: str
    started: int
    link: str | None
    texts: Mapping[str, str]
    measures: Mapping[str, float]
    curve: tuple[Point[float], ...]
    config: Mapping[str, str]
    held_out: str | None
    report: str | None = None
    teacher_knn: Mapping[str, float] = field(default_factory=dict)
    evaluated_by: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether its measures are final."""
        return self.texts["status"] == "finished"


@dataclass(frozen=True)
class CollectedRuns:
    """The rows, by the start of their first run.

    Attributes:
        latency: the setting of latencies.
        left_out: number of omitted runs by job.
        all_measures: by key.
        places: where images lie, by the name of the set.
    """

    entries: tuple[Entry, ...]
    latency: str | None
    left_out: Mapping[str, int]
    all_measures: Mapping[str, Measure]
    places: Mapping[str, str]


def collect(experiment: Experiment) -> CollectedRuns:
    """Build one row per student: the run that trained it, joined with the runs that evaluated it.

    If several runs of one job evaluated a student on the same images, the latest counts. A row holds figures on one set of
    images: those of the run, or of its evaluations if it had none. Figures on each other set are a row of their own.
    Evaluations of a student that no run of the experiment trained form a row of their own.

    Raises:
        UserError: if there is nothing to compare.
    """
    runs = unify(experiment.runs, PROBES)
    jobs = [run for run in runs if run.parent is None]
    parts = {run.run_id: [part for part in runs if part.parent == run.run_id] for run in jobs}
    job_of = {part.run_id: job for job, nested in parts.items() for part in nested} | {job: job for job in parts}
    without_student = [run for run in jobs if run.tags.get("job") in JOBS_WITHOUT_STUDENT]
    chosen = experiment.chosen - {run.run_id for run in without_student}
    rows = {run.run_id: [run] for run in jobs if run.run_id in chosen and not is_evaluation(run)}
    for run in jobs:
        if not is_evaluation(run):
            continue
        origin = job_of.get(_origin(run, parts) or "")
        if origin in rows:
            rows[origin].append(run)
        elif run.run_id in chosen:
            alone = run.tags["job"] == "finetune"  # two runs on one student are two trainings
            rows.setdefault(run.run_id if alone else origin or student_key(run), []).append(run)
    if not rows:
        raise UserError(_nothing_to_compare(experiment, jobs))
    columns = columns_of(_own_tasks(jobs))
    entries = [entry for row in rows.values() for entry in _entries(experiment, row, parts, columns.values())]
    entries, setting = _with_latencies(entries, [run for run in without_student if run.tags["job"] == "benchmark"])
    left_out = Counter(run.tags["job"] for run in without_student)
    return CollectedRuns(tuple(entries), setting, left_out, measures_of(columns.values()), places(runs))


def _nothing_to_compare(experiment: Experiment, jobs: Iterable[LoggedRun]) -> str:
    there = Counter(run.tags.get("job", "other") for run in jobs)
    held = ", ".join(f"{count} {job}" for job, count in there.items()) or "no runs"
    if len(experiment.chosen) < len(experiment.runs):
        return f"--filter: it leaves no run of {experiment.name} to compare; the experiment holds {held}"
    return f"--experiment: {experiment.name} has no run to compare; it holds {held}"


def _origin(run: LoggedRun, parts: Mapping[str, list[LoggedRun]]) -> str | None:
    """Id of the run that trained the student, from the tags of the run or of its nested runs."""
    return next((found for part in (run, *parts[run.run_id]) if (found := part.tags.get("student_run"))), None)


def _own_tasks(jobs: Iterable[LoggedRun]) -> Iterator[type[DownstreamTask[Any]]]:
    """The users' own tasks of these runs; a task that cannot be imported here has no columns."""
    named = (parameter(run, "finetune.task") for run in jobs if is_evaluation(run) and run.tags["job"] not in PROBES)
    for task in dict.fromkeys(task for task in named if task and task not in TASKS):
        try:
            yield load_task(task)
        except UserError as error:
            log.warning("the metrics of %s are left out: %s", task, error)


def _entries(
    experiment: Experiment,
    runs: list[LoggedRun],
    parts: Mapping[str, list[LoggedRun]],
    columns: Collection[Column],
) -> list[Entry]:
    """The row of a student, and those of its figures on further images."""
    trained = [run for run in runs if not is_evaluation(run)]
    finished = [run for run in runs if run.status == "FINISHED"]
    run = next(iter(trained or finished or runs))
    others = [other for other in runs if other is not run]
    nested, data = parts[run.run_id], _data(run, parts)
    training = next((part for part in nested if part.name in ("distill", "finetune")), None)
    own = _own_measures(run, training) if training else {}
    name, side = timm_student(run), input_size(run)
    size = _compute_size(name, int(side)) if name and side and not own.keys() & {"parameters", "macs"} else {}
    judged = [(other, image_set(other, _data(other, parts), "val")) for other in finished if other not in trained]
    held_out = image_set(run, data, "val") or next((images for _, images in judged if images), None)
    figures = _by_images(judged, columns)
    for key in own.keys() & figures.keys():
        figures[key][held_out] = run, own[key]
    row = Entry(
        run_id=run.run_id,
        name=run.name,
        started=run.started,
        link=experiment.link(run.run_id),
        texts=describe(run, data),
        measures={**size, **own},
        curve=_curve(experiment, nested),
        config={**configuration(run, data), **({"data.val": held_out} if held_out else {})},
        held_out=held_out,
        report=experiment.report(run),
        teacher_knn=_teacher_knn(run),
        evaluated_by=tuple(other.name for other in others if other in finished),
        unfinished=tuple(other.name for other in others if other not in finished),
    )
    return _with_figures(experiment, row, figures)


def _data(run: LoggedRun, parts: Mapping[str, list[LoggedRun]]) -> dict[str, tuple[str, str]]:
    """The images of a run and of its nested runs, by split."""
    return {split: used for part in (run, *parts[run.run_id]) for split, used in part.data.items()}


def _by_images(judged: Iterable[tuple[LoggedRun, str | None]], task_columns: Collection[Column]) -> Figures:
    """Figures of finished evaluations, each given with its held-out images; on equal images, the latest counts."""
    found: Figures = {}
    for run, images in judged:
        for column in PROBES.get(run.tags["job"], task_columns):
            if (value := run.metrics.get(column.metric)) is not None and value != column.missing:
                values = found.setdefault(column.key, {})
                values.pop(images, None)  # the latest is the last
                values[images] = run, column.factor * value
    return found


def _with_figures(experiment: Experiment, row: Entry, figures: Figures) -> list[Entry]:
    """The row with the figures on its images, and a row for each further set of images."""
    measures = dict(row.measures)
    further: dict[str | None, dict[str, tuple[LoggedRun, float]]] = {}
    for key, values in figures.items():
        for images, found in values.items():
            if images == row.held_out:
                measures[key] = found[1]
            else:
                further.setdefault(images, {})[key] = found
    costs = {key: value for key, value in row.measures.items() if key in WITHOUT_IMAGES}
    rows = [replace(row, measures=measures)]
    for images, judged in further.items():
        run = max((run for run, _ in judged.values()), key=lambda run: run.started)
        rows.append(
            Entry(
                run_id=run.run_id,
                name=run.name,
                started=run.started,
                link=experiment.link(run.run_id),
                texts=row.texts,
                measures={**costs, **{key: value for key, (_, value) in judged.items()}},
                curve=(),
                config={**row.config, "data.val": images or "unknown"},
                held_out=images,
                report=experiment.report(run),
            )
        )
    return rows


def _own_measures(run: LoggedRun, training: LoggedRun) -> dict[str, float]:
    """Measures that a job and its nested training run have logged."""
    own, trained = run.metrics, training.metrics
    found = {
        **{name: trained.get(name) for name in ("samples_seen", "knn_raw", "parameters", "macs")},
        **{name: own.get(name) for name in ("knn_before", "cache_bytes", "gpu_hours")},
        "knn": own.get("knn_after", trained.get("knn")),
        "hours": own.get("hours", own["seconds"] / 3600 if "seconds" in own else None),
    }
    price = parameter(run, "plan.gpu_hour_price")
    if found["gpu_hours"] is not None and price:
        found["cost"] = found["gpu_hours"] * float(price)
    return {key: value for key, value in found.items() if value is not None}


def _teacher_knn(run: LoggedRun) -> dict[str, float]:
    prefix = "teacher_knn/"
    return {name.removeprefix(prefix): value for name, value in run.metrics.items() if name.startswith(prefix)}


@cache
def _compute_size(name: str, side: int) -> dict[str, float]:
    """Parameters and MACs of a student for which no run has logged them; empty if timm does not know it."""
    try:
        counted = inference_cost(Encoder(create_backbone(name)), side)
    except (UserError, RuntimeError, AssertionError) as error:
        log.warning("the size of %s is unknown: %s", name, one_line(error))
        return {}
    return {"parameters": counted.parameters, "macs": counted.macs}


def _curve(experiment: Experiment, nested: Iterable[LoggedRun]) -> tuple[Point[float], ...]:
    part = next((part for part in nested if "knn" in part.metrics and part.name == "distill"), None)
    if part is None:
        return ()
    epochs, knn, raw = (experiment.curve(part.run_id, name) for name in ("epoch", "knn", "knn_raw"))
    # At step 0 there is no epoch, and averaged and raw weights are equal.
    return tuple(
        Point(epochs.get(step, 0.0), value, raw.get(step, None if step else value)) for step, value in knn.items()
    )


def _with_latencies(entries: list[Entry], benchmarks: list[LoggedRun]) -> tuple[list[Entry], str | None]:
    students: dict[str, set[str]] = {}
    for entry in entries:
        if name := _plain_student(entry):
            students.setdefault(name, set()).add(entry.texts.get("input", ""))
    found = find_latencies(benchmarks, students)
    if found is None:
        return entries, None
    measured = {student: {"latency": latency} for student, latency in found.milliseconds.items()}
    extended = [
        replace(entry, measures={**entry.measures, **measured.get(_plain_student(entry) or "", {})})
        for entry in entries
    ]
    return extended, found.setting


def _plain_student(entry: Entry) -> str | None:
    """Name of a student in a benchmark; None if it has constructor arguments."""
    return None if student_arguments(entry.config) else entry.texts.get("student")
