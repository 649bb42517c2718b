"""Reads the runs of an experiment and their curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run as Logged
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn

from pipeline.errors import UserError, one_line
from pipeline.tracking.address import sqlite_file
from pipeline.tracking.run import connecting

PAGE = 1000
"""Largest number of runs of one search."""
IN_CONTEXT = "mlflow.data.context"


@dataclass(frozen=True)
class LoggedRun:
    """A run in the store.

    Attributes:
        parent: id of the parent run, or None.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        started: milliseconds since 1970.
        metrics: the latest value of each.
        data: (location, name that ends in 8 characters of the digest) of the images by context (``train``, ``val``).
    """

    run_id: str
    name: str
    parent: str | None
    status: str
    started: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    data: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Experiment:
    """An experiment in the store at `uri`.

    Attributes:
        runs: all that are not deleted, oldest first.
        chosen: ids of the runs that match the filter.
    """

    uri: str
    experiment_id: str
    name: str
    runs: tuple[LoggedRun, ...]
    chosen: frozenset[str]

    def curve(self, run_id: str, metric: str) -> dict[int, float]:
        """Value by step."""
        return {point.step: point.value for point in MlflowClient(self.uri).get_metric_history(run_id, metric)}

    def link(self, run_id: str) -> str | None:
        """URL of a run in MLflow's interface; None for a store without one."""
        scheme, host, path, *_ = urlsplit(self.uri)
        if scheme not in ("http", "https"):
            return None
        host = host.rpartition("@")[2]  # without a password
        return f"{scheme}://{host}{path.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def report(self, run: LoggedRun) -> str | None:
        """URL of a run's report in MLflow's interface, else of its file if that is on this machine; None: it has none."""
        file = Path(run.tags.get("report", ""))
        if run.tags.get("report") and (link := self.link(run.run_id)):
            return f"{link}/artifacts/{file.name}"
        return file.as_uri() if file.is_absolute() and file.is_file() else None


def read_experiment(uri: str, name: str, only: str = "") -> Experiment:
    """All runs of an experiment.

    Args:
        only: a filter in MLflow's syntax, ``tags.job = 'distill' and params.student.name LIKE 'regla%'``.

    Raises:
        UserError: if the store cannot be reached, has no such experiment, or cannot parse the filter.
    """
    refuse_missing_file(uri)
    with connecting(uri, "--tracking-uri"):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            known = ", ".join(experiment.name for experiment in client.search_experiments()) or "none"
            raise UserError(f"--experiment: there is no {name} at {uri}; there are: {known}")
        runs = search_runs(client, [found.experiment_id])
    try:
        chosen = search_runs(client, [found.experiment_id], only) if only else runs
    except MlflowException as error:
        raise UserError(
            f"--filter: MLflow cannot parse {only!r} ({one_line(error)}); write, for "
            "instance, \"params.student.name = 'regla_s' and metrics.knn_after > 20\""
        ) from error
    ordered = sorted(runs, key=lambda run: run.started)
    return Experiment(uri, found.experiment_id, name, tuple(ordered), frozenset(run.run_id for run in chosen))


def refuse_missing_file(uri: str) -> None:
    """Refuse a SQLite file that does not exist: MLflow would create an empty store."""
    file = sqlite_file(uri)
    if file and not file.is_file():
        raise UserError(f"--tracking-uri: there is no MLflow store at {uri}; name the one that the runs are in")


def search_runs(client: MlflowClient, experiments: Sequence[str], only: str = "") -> list[LoggedRun]:
    """The runs of these experiments that are not deleted and match a filter in MLflow's syntax."""
    runs: list[Logged] = get_results_from_paginated_fn(
        lambda most, token: client.search_runs([*experiments], only, ViewType.ACTIVE_ONLY, most, page_token=token),
        PAGE,
    )
    return [_logged(run) for run in runs]


def _logged(run: Logged) -> LoggedRun:
    info, data = run.info, run.data
    inputs = run.inputs.dataset_inputs if run.inputs else []
    used = {tag.value: _location(item.dataset) for item in inputs for tag in item.tags if tag.key == IN_CONTEXT}
    parent = data.tags.get("mlflow.parentRunId")
    name = info.run_name or info.run_id
    return LoggedRun(
        info.run_id, name, parent, info.status, info.start_time or 0, data.params, data.tags, data.metrics, used
    )


def _location(dataset: Any) -> tuple[str, str]:
    # Names that hold no digest are equal for different images.
    digest = str(dataset.digest)[:8]
    name = dataset.name if dataset.name.endswith(digest) else f"{dataset.name}-{digest}"
    try:
        return str(json.loads(dataset.source)["location"]), name
    except (ValueError, KeyError, TypeError):
        return "", name  # logged by another program
