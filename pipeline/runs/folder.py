"""The work folder, and the state of a run in it, from which the same command resumes.

    <work>/cache/                      the feature cache, unless cache.uri names another place
    <work>/runs/<name>-<hash>[-<n>]/   one run: run.json, log.txt, metrics.jsonl, report.html, checkpoints, the exported student
    <work>/mlflow.db, <work>/mlartifacts/

The hash is that of the non-default fields that change a run's numbers. A command resumes its unfinished run, under the same
MLflow run; after a finished run it starts another one, with the next number.
"""

import json
from pathlib import Path

from pydantic import BaseModel, Field, StrictBool, ValidationError

from pipeline.cache.config import CacheJobConfig
from pipeline.errors import UserError, blame_field
from pipeline.runs.config import JobConfig
from pipeline.runtime.ray_session import is_submitted_job
from pipeline.storage.atomic import atomic_write
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store


def work_folder(config: JobConfig) -> Path:
    """The absolute work folder; UserError if `work` is the address of an object store.

    A submitted job's default is in the home folder, as Ray deletes the copy of the working directory that the job runs in.
    """
    if config.work and "://" in config.work:
        raise UserError(
            f"work={config.work}: runs and MLflow's SQLite file need a folder, on a cluster one of a shared file system; an "
            "object store may hold the cache (cache.uri), checkpoints (train.checkpoints) and results (outputs)"
        )
    if config.work:
        return Path(config.work).expanduser().resolve()
    return Path.home() / "regla-distill" if is_submitted_job() else Path("work").resolve()


def cache_store(config: CacheJobConfig) -> Store:
    """The folder or object store of the cache; UserError if the object store cannot be used."""
    with blame_field("cache.uri"):
        store = Store.at(config.cache.uri or work_folder(config) / "cache")
        store.check()
    return store


class RunState(BaseModel):
    """State of one run; run.json in its folder holds it.

    Attributes:
        mlflow: MLflow run ids by role (``job``, ``precompute``, ``distill``).
        finished: whether the job is complete.
        resumed: whether this process found the run unfinished.
        hours, gpu_hours: of all its starts.
        data: versions of the data sets that the run uses, by data set; empty until all their images are in the cache.
    """

    folder: Path = Field(exclude=True)
    resumed: bool = Field(False, exclude=True)
    mlflow: dict[str, str]
    finished: StrictBool
    hours: float = 0.0
    gpu_hours: float = 0.0
    data: dict[str, str] = {}

    def save(self) -> None:
        """Write run.json atomically; UserError if it cannot be written."""
        file = self.folder / "run.json"
        try:
            with atomic_write(file) as out:
                out.write(self.model_dump_json(indent=2).encode())
        except OSError as error:
            raise UserError(
                f"cannot write {file}: {error.strerror}; once it can be written, the same command resumes from here"
            ) from error


def open_run(config: JobConfig, job: str) -> RunState:
    """The unfinished run of this job and configuration, or a new one."""
    runs = work_folder(config) / "runs"
    stem = f"{folder_name(config.name)}-{job}-{config.fingerprint()[:8]}"
    number = 1
    while True:
        folder = runs / (stem if number == 1 else f"{stem}-{number}")
        if not (folder / "run.json").exists():
            return RunState(folder=folder, mlflow={}, finished=False)
        state = _read_state(folder)
        if not state.finished:
            return state
        number += 1


def _read_state(folder: Path) -> RunState:
    file = folder / "run.json"
    try:
        return RunState(folder=folder, resumed=True, **json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = "fields are of another type" if isinstance(error, ValidationError) else error
        raise UserError(f"{file} cannot be read ({reason}): remove it, and the run starts over") from error
