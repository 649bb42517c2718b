"""Runs of an experiment as rows: what trained a student, with all that evaluated it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipeline.compare.describe import configuration, describe, given, held_by, student_arguments, student_key
from pipeline.compare.latency import Latencies, find_latencies
from pipeline.compare.size import counted_size
from pipeline.errors import UserError
from pipeline.tracking.reading import Experiment, LoggedRun

NO_ROWS = ("compare", "precompute", "benchmark")
"""Jobs without a student of their own."""
TRAINING = ("distill", "finetune")
"""Names of the nested runs that train."""
SIZE = ("parameters", "macs")
DOWNSTREAM = {
    "top1": ("top1", 1.0),
    "miou": ("miou", 1.0),
    "box/AP": ("box_ap", 100.0),
    "mask/AP": ("mask_ap", 100.0),
}
JUDGED: dict[str, dict[str, tuple[str, float]]] = {
    "knn": {"knn": ("knn", 1.0)},
    "linear": {"top1": ("linear", 1.0)},
    "seg-probe": {"miou": ("probe_miou", 1.0)},
    "finetune": DOWNSTREAM,
    **{f"evaluate-{task}": DOWNSTREAM for task in ("classify", "segment", "detect")},
}
"""By job, the measure (and the factor to its unit) that a metric is."""


@dataclass(frozen=True)
class Point:
    """kNN in percent after an epoch, of the averaged and the raw weights."""

    epoch: float
    knn: float | None
    raw: float | None


@dataclass(frozen=True)
class Entry:
    """A run beside the others.

    Attributes:
        run_id, name, started: as MLflow has them; milliseconds since 1970.
        link: address in MLflow's pages, where there are any.
        texts: by :data:`~pipeline.compare.measures.TEXTS`.
        measures: by :data:`~pipeline.compare.measures.MEASURES`; what is not known is not there.
        curve: kNN by epoch.
        config: what its group goes by.
        held_out: the images that accuracies are on; None: not known.
        judged_by: names of the runs that evaluated or fine-tuned its student.
    """

    run_id: str
    name: str
    started: int
    link: str | None
    texts: Mapping[str, str]
    measures: Mapping[str, float]
    curve: tuple[Point, ...]
    config: Mapping[str, str]
    held_out: str | None
    judged_by: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether its figures are final."""
        return self.texts["status"] == "finished"


@dataclass(frozen=True)
class Collection:
    """The rows, how latencies were measured, and how many runs of a job are no rows."""

    entries: tuple[Entry, ...]
    latency: str | None
    left_out: Mapping[str, int]


def collect(experiment: Experiment) -> Collection:
    """One row for each student: the run that made it, joined with the runs that evaluated it.

    Where several runs of a job evaluated one student, the latest counts. A run that evaluated a student of which the
    experiment knows no origin is a row by itself, with others of the same student.

    Raises:
        UserError: where there is nothing to compare.
    """
    jobs = [run for run in experiment.runs if run.parent is None]
    parts = {run.run_id: [part for part in experiment.runs if part.parent == run.run_id] for run in jobs}
    job_of = {part.run_id: job for job, nested in parts.items() for part in nested} | {job: job for job in parts}
    chosen = {run.run_id for run in jobs if run.run_id in experiment.chosen and run.tags.get("job") not in NO_ROWS}
    rows = {run.run_id: [run] for run in jobs if run.run_id in chosen and run.tags.get("job") not in JUDGED}
    for run in jobs:
        if run.tags.get("job") not in JUDGED:
            continue
        origin = job_of.get(_origin(run, parts) or "")
        if origin in rows:
            rows[origin].append(run)
        elif run.run_id in chosen:
            alone = run.tags["job"] == "finetune"  # two of one student are two trainings
            rows.setdefault(run.run_id if alone else origin or student_key(run), []).append(run)
    if not rows:
        raise UserError(_nothing(experiment, jobs))
    entries = [_entry(experiment, runs, parts) for runs in rows.values()]
    entries, setting = _with_latencies(entries, [run for run in jobs if run.tags.get("job") == "benchmark"])
    left_out = Counter(run.tags["job"] for run in jobs if run.tags.get("job") in NO_ROWS)
    return Collection(tuple(entries), setting, left_out)


def _nothing(experiment: Experiment, jobs: Iterable[LoggedRun]) -> str:
    there = Counter(run.tags.get("job", "other") for run in jobs)
    held = ", ".join(f"{count} {job}" for job, count in there.items()) or "no runs"
    if len(experiment.chosen) < len(experiment.runs):
        return f"--filter: it leaves no run of {experiment.name} to compare; the experiment holds {held}"
    return f"--experiment: {experiment.name} has no run to compare; it holds {held}"


def _origin(run: LoggedRun, parts: Mapping[str, list[LoggedRun]]) -> str | None:
    """The run that trained the student of this one, as the run or its parts say."""
    return next((found for part in (run, *parts[run.run_id]) if (found := part.tags.get("student_run"))), None)


def _entry(experiment: Experiment, runs: list[LoggedRun], parts: Mapping[str, list[LoggedRun]]) -> Entry:
    trained = [run for run in runs if run.tags.get("job") not in JUDGED]
    run = next(iter(trained or [run for run in runs if run.status == "FINISHED"] or runs))
    nested = parts[run.run_id]
    data = {split: used for part in (run, *nested) for split, used in part.data.items()}
    own = _own_measures(run, nested) if any(part.name in TRAINING for part in nested) else {}
    size = {} if own.keys() & set(SIZE) else counted_size(run)
    return Entry(
        run_id=run.run_id,
        name=run.name,
        started=run.started,
        link=experiment.link(run.run_id),
        texts=describe(run, data),
        measures={**_judgements(other for other in runs if other not in trained), **size, **own},
        curve=_curve(experiment, nested),
        config=configuration(run, data),
        held_out=held_by(run, data, "val"),
        judged_by=tuple(other.name for other in runs if other is not run),
    )


def _own_measures(run: LoggedRun, nested: Iterable[LoggedRun]) -> dict[str, float]:
    """What a run that trained says of itself and its student."""
    training = next(part.metrics for part in nested if part.name in TRAINING)
    own = run.metrics
    found = {
        "samples_seen": training.get("samples_seen"),
        "knn_before": own.get("knn_before"),
        "knn": own.get("knn_after", training.get("knn")),
        "knn_raw": training.get("knn_raw"),
        **{key: training[key] for key in SIZE if key in training},
        "cache_bytes": own.get("cache_bytes"),
        "hours": own.get("hours", own["seconds"] / 3600 if "seconds" in own else None),
        "gpu_hours": own.get("gpu_hours"),
    }
    price = given(run, "plan.gpu_hour_price")
    if found["gpu_hours"] is not None and price:
        found["cost"] = found["gpu_hours"] * float(price)
    return {key: value for key, value in found.items() if value is not None}


def _judgements(judges: Iterable[LoggedRun]) -> dict[str, float]:
    """What evaluations say, the latest last; of those that did not come to their end, nothing."""
    return {
        key: factor * judge.metrics[metric]
        for judge in judges
        if judge.status == "FINISHED"
        for metric, (key, factor) in JUDGED[judge.tags["job"]].items()
        if judge.metrics.get(metric, -1.0) >= 0  # -1 is COCO's word for "there is none"
    }


def _curve(experiment: Experiment, nested: Iterable[LoggedRun]) -> tuple[Point, ...]:
    part = next((part for part in nested if "knn" in part.metrics and part.name == "distill"), None)
    if part is None:
        return ()
    epochs, knn, raw = (experiment.curve(part.run_id, name) for name in ("epoch", "knn", "knn_raw"))
    # Before the first step there is no epoch, and averaged and raw weights are the same.
    return tuple(
        Point(epochs.get(step, 0.0), value, raw.get(step, None if step else value)) for step, value in knn.items()
    )


def _with_latencies(entries: list[Entry], benchmarks: list[LoggedRun]) -> tuple[list[Entry], str | None]:
    students: dict[str, set[str]] = {}
    for entry in entries:
        if name := _plain_student(entry):
            students.setdefault(name, set()).add(entry.texts.get("input", ""))
    found: Latencies | None = find_latencies(benchmarks, students)
    if found is None:
        return entries, None
    return [_with_latency(entry, found) for entry in entries], found.setting


def _with_latency(entry: Entry, found: Latencies) -> Entry:
    latency = found.milliseconds.get(_plain_student(entry) or "")
    return entry if latency is None else replace(entry, measures={**entry.measures, "latency": latency})


def _plain_student(entry: Entry) -> str | None:
    """The name that a benchmark gives a student without arguments of its own."""
    return None if student_arguments(entry.config) else entry.texts.get("student")
