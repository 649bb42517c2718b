"""The evaluations of a student that an MLflow store holds, for its model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient

from pipeline.tracking.reading import LoggedRun, refuse_missing_file, search_runs
from pipeline.tracking.run import connecting

OF_THE_JOB = ("hours", "gpu_hours")
"""Metrics of every job, which say nothing about the student."""


def evaluations(uri: str, student_run: str) -> list[dict[str, Any]]:
    """The finished evaluations of the student that a run trained, in all experiments, JSON-ready, oldest first.

    Each has the name of the `evaluation`, whose `features` it used in words, the location of its `images` and the name of their
    `set`, its `figures` as logged, and its `run_id`. Those of fine-tuned models are not of the student.

    Raises:
        UserError: if there is no such store, or it cannot be reached.
    """
    refuse_missing_file(uri)
    with connecting(uri, "--tracking-uri"):
        experiments = [found.experiment_id for found in MlflowClient(uri).search_experiments()]
        query = f"tags.student_run = '{student_run}' and attributes.status = 'FINISHED'"
        runs = search_runs(MlflowClient(uri), experiments, query)
    own = [run for run in runs if run.parent is None and not run.tags.get("job", "evaluate-").startswith("evaluate-")]
    return [_described(run) for run in sorted(own, key=lambda run: run.started)]


def latest(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last of each kind, features and set of images, of entries as in :func:`evaluations`."""
    return list({(entry["evaluation"], entry["features"], entry["set"]): entry for entry in found}.values())


def _described(run: LoggedRun) -> dict[str, Any]:
    location, name = run.data.get("val", ("", ""))
    head = f"the head of {run.tags['teacher']}" if "teacher" in run.tags else "the backbone"
    return {
        "evaluation": run.tags["job"],
        "features": run.tags.get("features", head),
        "images": location,
        "set": name,
        "figures": {
            key: value for key, value in sorted(run.metrics.items()) if "/" not in key and key not in OF_THE_JOB
        },
        "run_id": run.run_id,
    }
