"""One job from start to end: its run folder, its MLflow run, its Ray session, and their end whatever happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import naming, one_line
from pipeline.runs.config import JobConfig
from pipeline.runs.folder import RunState, open_run, work_folder
from pipeline.runs.results import outputs_store, publish
from pipeline.runs.shared_paths import check_shared
from pipeline.runtime import logs
from pipeline.runtime.ray_session import connect, devices, hardware_line
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.registry import Registration, describe, model_link, register
from pipeline.tracking.run import Run, start_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A running job.

    Attributes:
        config: the whole tree.
        name: of the job.
        state: its run folder and what is known of it.
        run: the parent MLflow run.
        tracking_uri: where that is.
    """

    config: JobConfig
    name: str
    state: RunState
    run: Run
    tracking_uri: str

    @contextmanager
    def child_run(self, name: str) -> Iterator[Run]:
        """A nested MLflow run; the one of an interrupted start is continued."""
        run = self.run.child(name, run_id=self.state.mlflow.get(name))
        self.state.mlflow[name] = run.run_id
        self.state.save()
        with _ended(run), logs.context(stage=name):
            yield run

    def register(
        self, kind: str, model_uri: str, *, metric: str, score: float | None, held_out: str, lineage: Mapping[str, str]
    ) -> str | None:
        """Put a model into MLflow's registry as `<recipe>-<kind>`, and say so in the run's description.

        Args:
            kind: `student`, or the task that it was fine-tuned for.
            model_uri, metric, score, held_out, lineage: as in :class:`pipeline.tracking.registry.Registration`.

        Returns:
            Its URI in the registry; None where there is no registry, which the log says.
        """
        filled = {f"manifests{key.removeprefix('precompute')}": f"runs:/{run}/manifests" for key, run in self._filled()}
        name = f"{folder_name(self.config.name)}-{kind}"
        held_out = self.config.name_held_out(held_out)
        registered = register(
            self.run,
            Registration(name, model_uri, metric, score, held_out, {**lineage, **filled, "run": self.run.run_id}),
        )
        told = "nothing was measured" if score is None else f"{metric} {score:.4g}"
        where = f"[{registered}]({model_link(registered)})" if registered else f"`{model_uri}`"
        describe(self.run, [*self.config.note(self.name), f"Result: {told}, {where}."])
        return registered

    def _filled(self) -> list[tuple[str, str]]:
        return [(key, run) for key, run in self.state.mlflow.items() if key.startswith("precompute")]


@contextmanager
def open_job(config: JobConfig, name: str) -> Iterator[Job]:
    """Connect to Ray; resume the unfinished run of this job and configuration, or start one; end both.

    Raises:
        UserError: where MLflow, Ray or a place that is written cannot be used, or a node does not see the job's files.
    """
    outputs = outputs_store(config.outputs) if config.outputs else None
    _check_writable({"work": str(work_folder(config)), **config.shared_folders()})
    uri = resolve_uri(config.tracking.uri, work_folder(config))  # before Ray's processes inherit a password
    with connect():
        print(hardware_line(), flush=True)
        check_shared(config)
        run, state = _start(config, uri, name)
        with _ended(run), _metered(run, state), logs.context(run=state.folder.name):
            yield Job(config, name, state, run, uri)
            if outputs:
                run.set_tags({"outputs": publish(state.folder, outputs)})
        # Not before everything is sent: a second start sends what is left.
        state.finished = True
        state.save()


def _check_writable(places: Mapping[str, str]) -> None:
    """Refuse a place, by its field, before anything is computed for it."""
    for field, place in places.items():
        if field != "cache.uri":  # a complete cache may be read-only
            with naming(field):
                Store.at(place).check_writable()


def _start(config: JobConfig, uri: str, name: str) -> tuple[Run, RunState]:
    state = open_run(config, name)
    run = start_run(
        uri,
        experiment=config.tracking.experiment,
        name=config.title(name),
        config=config.model_dump(mode="json"),
        tags={"job": name},
        work=work_folder(config),
        folder=state.folder,
        run_id=state.mlflow.get("job"),
    )
    describe(run, config.note(name))
    state.mlflow["job"] = run.run_id
    state.save()
    return run, state


@contextmanager
def _metered(run: Run, state: RunState) -> Iterator[None]:
    """Hours, and GPU hours where there are GPUs, of all starts of a run; one that is killed outright tells nothing."""
    started = time.monotonic()
    try:
        yield
    finally:
        try:
            _add_hours(run, state, (time.monotonic() - started) / 3600)
        except Exception as error:  # noqa: BLE001  it must not take the place of what ended the job
            log.warning("the hours of this start are not recorded: %s", one_line(error))


def _add_hours(run: Run, state: RunState, hours: float) -> None:
    gpus, kind = devices()
    state.hours, state.gpu_hours = state.hours + hours, state.gpu_hours + hours * gpus
    state.save()
    run.set_tags({"device": kind})
    run.log_metric_dict({"hours": state.hours, **({"gpu_hours": state.gpu_hours} if state.gpu_hours else {})})


@contextmanager
def _ended(run: Run) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()
