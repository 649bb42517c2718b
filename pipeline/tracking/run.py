"""A run: its metrics, parameters, artifacts and data."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import UserError
from pipeline.metrics import export_training

BATCH = 1000
"""Most metrics that one `log_batch` takes."""
PARAM_LENGTH = 6000
"""Longest value of a parameter; the whole configuration is an artifact anyway."""


NOTE = "mlflow.note.content"
"""Tag of what the interface shows as the description, in Markdown."""


def resolve_uri(configured: str | None, work: Path) -> str:
    """The tracking URI: the configured one, else MLFLOW_TRACKING_URI, else a SQLite file in the work folder.

    Raises:
        UserError: where the configured one holds a password, since configurations are logged; the message repeats none.
    """
    if configured and urlsplit(configured).password:
        raise UserError(
            "tracking.uri: a password in an address is refused, since configurations are logged; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI"
        )
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work}/mlflow.db"


@dataclass(frozen=True)
class Run:
    """One MLflow run. Picklable: Ray Train's controller logs to it as well.

    Attributes:
        uri: of the tracking store.
        experiment_id, run_id: as MLflow names them.
    """

    uri: str
    experiment_id: str
    run_id: str

    def __getstate__(self) -> dict[str, str]:
        return {name: self.__dict__[name] for name in ("uri", "experiment_id", "run_id")}

    @cached_property
    def client(self) -> MlflowClient:
        """The client of this process."""
        return MlflowClient(self.uri)

    def child(self, name: str, run_id: str | None = None) -> Run:
        """A nested run; the one of `run_id` is continued if it is still there."""
        tags = {"mlflow.parentRunId": self.run_id, NOTE: f"Part of [the job]({run_link(self)}), which says what it is."}
        return _open(self.uri, self.experiment_id, name, tags, run_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; values that are too long are cut, and a value that changed is left as it was first logged."""
        known = self.client.get_run(self.run_id).data.params
        fresh = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items() if key not in known]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(self.run_id, params=fresh[first : first + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:PARAM_LENGTH]) for key, value in tags.items()])

    def log_metrics(self, history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics by step, in batches. Values that are not finite are left out: stores refuse or alter them."""
        history = list(history)
        export_training(history)
        now = int(time.time() * 1000)
        points = (
            Metric(name, float(value), now, step)
            for step, metrics in history
            for name, value in metrics.items()
            if math.isfinite(value)
        )
        while batch := list(islice(points, BATCH)):
            self.client.log_batch(self.run_id, metrics=batch)

    def log_metric_dict(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step."""
        self.log_metrics([(step, metrics)])

    def log_text(self, text: str, path: str) -> None:
        """Log text as the artifact `path`."""
        self.client.log_text(self.run_id, text, path)

    def log_dict(self, value: Mapping[str, Any], path: str) -> None:
        """Log a JSON or YAML artifact, by the ending of `path`."""
        self.client.log_dict(self.run_id, dict(value), path)

    def log_file(self, file: Path, folder: str) -> None:
        """Log a file into an artifact folder."""
        self.client.log_artifact(self.run_id, str(file), folder)

    def log_folder(self, source: Path, folder: str) -> None:
        """Log everything in a local folder into an artifact folder."""
        self.client.log_artifacts(self.run_id, str(source), folder)

    def log_dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """Log which data a run used: its content-addressed name, where it came from, and for what it was used."""
        dataset = Dataset(name, digest[:36], source_type="location", source=json.dumps({"location": source}))
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def run_link(run: Run) -> str:
    """Where the interface shows a run, from any of its pages."""
    return f"#/experiments/{run.experiment_id}/runs/{run.run_id}"


def start_job(
    uri: str,
    *,
    experiment: str,
    name: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    work: Path,
    run_id: str | None = None,
) -> Run:
    """Open the parent run of a job: a new one, or the one of `run_id` if it is still there.

    The store is created here, by one process, before any worker writes to it: SQLite's first use does not stand a race.

    Args:
        config: the resolved configuration, logged flat as parameters and whole as `config.yaml`.
        work: where artifacts go when the store is the SQLite file there.

    Raises:
        UserError: where the store cannot be reached or opened.
    """
    with _probing(uri), _alone(uri):
        mlflow.set_tracking_uri(uri)
        run = _open(uri, _experiment(uri, experiment, work), name, dict(tags), run_id)
    run.set_tags({**tags, **_git_tags()})
    run.log_params(dict(_flatten(config)))
    run.log_text(yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
    return run


@contextmanager
def _probing(uri: str) -> Iterator[None]:
    retries, timeout = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"MLflow at {uri} cannot be used ({reason}); start that server, or name another in tracking.uri"
        ) from error
    finally:
        os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries, "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Jobs that start at once open a SQLite store one after the other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_EXPERIMENT_NOTE = """Runs of ReGLA Distill. Each job is a run that says what it does, with its phases nested in it; the
images that it used are its inputs. What came out is in the [model registry](#/models): of each model, the version with the
alias `best` is the one to take."""


def _experiment(uri: str, name: str, work: Path) -> str:
    client = MlflowClient(uri)
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    artifacts = str(work / "mlartifacts") if uri.startswith("sqlite:///") else None
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags={NOTE: _EXPERIMENT_NOTE}))
    except MlflowException:
        # Another process may have created it in between.
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
        return str(known.experiment_id)


def _open(uri: str, experiment_id: str, name: str, tags: dict[str, str], run_id: str | None) -> Run:
    client = MlflowClient(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return Run(uri, experiment_id, run_id)
        except MlflowException:
            pass  # deleted, or another store: start anew
    created = client.create_run(experiment_id, tags=tags, run_name=name)
    return Run(uri, experiment_id, created.info.run_id)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for number, item in enumerate(tree):
            yield from _flatten(item, f"{prefix}{number}.")
    else:
        yield prefix.rstrip("."), tree


def _git_tags() -> dict[str, str]:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}
