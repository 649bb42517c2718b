"""A run in MLflow: its metrics, parameters, artifacts and data."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import UserError, one_line
from pipeline.storage.store import Store
from pipeline.tracking.address import sqlite_file
from pipeline.tracking.messages import send_message
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.sender import PATIENCE_S, Sender, is_permanent, retry_until_reachable, unreachable_error
from pipeline.tracking.write_buffer import WriteBuffer

NOTE = "mlflow.note.content"
"""Tag that the interface shows as the description, in Markdown."""

for _logger in ("mlflow", "alembic"):
    logging.getLogger(_logger).setLevel(logging.ERROR)  # after the import, which sets the level

log = logging.getLogger(__name__)


@dataclass
class Run(RunLog):
    """One MLflow run, in the process that opened it, which sends the buffer.

    A thread sends; the first call starts it, and :meth:`finish` ends it. Pickled copies are :class:`RunLog`, which only append.
    """

    uri: str
    experiment_id: str

    def __reduce__(self) -> tuple[Callable[..., RunLog], tuple[str, WriteBuffer]]:
        return partial(RunLog, parent=self.parent), (self.run_id, self.buffer)

    @cached_property
    def client(self) -> MlflowClient:
        """The client of the process that opened the run."""
        return MlflowClient(self.uri)

    @cached_property
    def _sender(self) -> Sender:
        return Sender(self.buffer, partial(send_message, self.client, self.run_id, self.buffer), self.uri)

    def child(self, name: str, run_id: str | None = None) -> Run:
        """A nested run: a new one, or `run_id` if it still exists; UserError if the server is silent for minutes."""
        note = f"Part of [the job]({run_link(self)}), which describes it."
        tags, buffers = {"mlflow.parentRunId": self.run_id, NOTE: note}, Store(self.buffer.store.uri.rpartition("/")[0])
        opened = retry_until_reachable(
            self.uri, lambda: _open(self.uri, self.experiment_id, name, tags, run_id, buffers)
        )
        return replace(opened, parent=self)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED.

        Raises:
            UserError: if a FINISHED run cannot be sent within minutes; the next start sends the rest.
        """
        self._post("status", [status, int(time.time() * 1000)])
        done = status == "FINISHED"
        sent = self._sender.flush(PATIENCE_S if done else None)
        problem = self._sender.problem
        self._sender.close()
        del self._sender
        if done and not sent:
            raise unreachable_error(self.uri, problem)
        if done:
            self.buffer.store.delete_folder()

    def flush(self) -> None:
        """Wait until everything is sent; UserError if the server does not answer for minutes."""
        if not self._sender.flush(PATIENCE_S):
            raise unreachable_error(self.uri, self._sender.problem)

    def _post(self, kind: str, content: Any) -> None:
        super()._post(kind, content)
        self._sender.flush()


def run_link(run: Run) -> str:
    """Link to a run that works on every page of the interface."""
    return f"#/experiments/{run.experiment_id}/runs/{run.run_id}"


def start_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    work: Path,
    folder: Path | None = None,
    run_id: str | None = None,
) -> Run:
    """Open the parent run of a job: a new one, or run `run_id` if it still exists.

    Args:
        config: the resolved configuration, logged as flat parameters and as the artifact `config.yaml`.
        work: folder of the artifacts if the store is a SQLite file.
        folder: of the run, for unsent messages; None: the work folder.

    Raises:
        UserError: if the store cannot be reached or opened.
    """
    with connecting(uri), _locked(uri):
        mlflow.set_tracking_uri(uri)
        buffers = Store.at((folder or work) / "unsent")
        run = _open(uri, _experiment(uri, experiment, work), name, dict(tags), run_id, buffers)
    commit = get_git_commit(__file__)
    run.set_tags({**tags, **({"mlflow.source.git.commit": commit} if commit else {})})
    run.log_params(dict(_flatten(config)))
    run.log_text(yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
    return run


@contextmanager
def connecting(uri: str, field: str = "tracking.uri") -> Iterator[None]:
    """Make the first contact with a store fail within seconds, with a UserError that names the field of its address."""
    retries, timeout = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        if "MLFLOW_ALLOW_FILE_STORE" in str(error):
            raise UserError(
                f"{field}: {uri} is a folder of files, which MLflow maintains no longer; name a database, such as "
                "sqlite:///mlflow.db (`mlflow migrate-filestore` moves the runs there), or set MLFLOW_ALLOW_FILE_STORE=true"
            ) from error
        remedy = "start that server, or name another" if uri.startswith("http") else "name another store"
        raise UserError(f"MLflow at {uri} cannot be used ({one_line(error)}); {remedy} in {field}") from error
    finally:
        os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries, "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Let jobs open a SQLite store one after the other: concurrent first uses fail."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    if (escaped := Path(uri.removeprefix("sqlite:///")).parent) != file.parent:
        with suppress(OSError):
            os.removedirs(escaped)  # MLflow makes the folder of the URI as it is written


_EXPERIMENT_NOTE = """Runs of ReGLA Distill. Each job is a run that describes what it does, with its stages as nested runs and
its images as inputs. The trained models are in the [model registry](#/models); take the version with the alias `best`."""


def _experiment(uri: str, name: str, work: Path) -> str:
    client = MlflowClient(uri)
    known = client.get_experiment_by_name(name)
    if known is None:
        artifacts = _artifact_location(work) if sqlite_file(uri) else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags={NOTE: _EXPERIMENT_NOTE}))
        except MlflowException as error:
            known = client.get_experiment_by_name(name)  # another process may have created it in the meantime
            if known is None and is_permanent(error):
                raise UserError(
                    f"tracking.experiment: MLflow refuses the name {name[:40]!r} ({one_line(error)})"
                ) from error
            if known is None:
                raise
    if known.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: experiment {name} was deleted in MLflow; restore it (mlflow experiments restore -x "
            f"{known.experiment_id}), or name another in tracking.experiment"
        )
    return str(known.experiment_id)


def _artifact_location(work: Path) -> str:
    """A folder beside the store; a URI where a plain path would be unescaped by MLflow."""
    folder = work / "mlartifacts"
    return folder.as_uri() if {"%", "?"} & set(str(folder)) else str(folder)


def _open(uri: str, experiment_id: str, name: str, tags: dict[str, str], run_id: str | None, buffers: Store) -> Run:
    client = MlflowClient(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            buffer = WriteBuffer(buffers.sub(run_id))
            buffer.discard("status")  # of an earlier start that ended while the server was down
            return Run(run_id, buffer, uri, experiment_id)
        except MlflowException as error:
            if not is_permanent(error):
                raise
            # deleted, or in another store: create a new run
    created = client.create_run(experiment_id, tags=tags, run_name=name)
    run_id = created.info.run_id
    return Run(run_id, WriteBuffer(buffers.sub(run_id)), uri, experiment_id)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for number, item in enumerate(tree):
            yield from _flatten(item, f"{prefix}{number}.")
    else:
        yield prefix.rstrip("."), tree
