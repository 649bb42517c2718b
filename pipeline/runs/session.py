"""One job from start to end: its run folder, MLflow run and Ray session, which end however the job ends."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import blame_field, one_line
from pipeline.report.report import Report, write_report
from pipeline.runs.config import JobConfig
from pipeline.runs.disk import release
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
    """A running job: its configuration, run folder with progress (`state`), and parent MLflow run."""

    config: JobConfig
    name: str
    state: RunState
    run: Run
    tracking_uri: str

    @contextmanager
    def child_run(self, name: str) -> Iterator[Run]:
        """A nested MLflow run, resumed after an interruption."""
        run = self.run.child(name, run_id=self.state.mlflow.get(name))
        self.state.mlflow[name] = run.run_id
        self.state.save()
        with _finish(run), logs.context(stage=name):
            yield run

    def register(
        self, kind: str, model_uri: str, *, metric: str, score: float | None, held_out: str, lineage: Mapping[str, str]
    ) -> str | None:
        """Register a model in MLflow as `<recipe>-<kind>`, and link to it in the run's description.

        Args:
            kind: `student`, or the task of a fine-tuned model.
            model_uri, metric, score, held_out, lineage: as in :class:`pipeline.tracking.registry.Registration`.

        Returns:
            Its URI in the registry; None, with a warning, if it could not be registered.
        """
        manifests = {
            f"manifests{key.removeprefix('precompute')}": f"runs:/{run_id}/manifests"
            for key, run_id in self.state.mlflow.items()
            if key.startswith("precompute")
        }
        name = f"{folder_name(self.config.name)}-{kind}"
        origin = {**lineage, **manifests, "run": self.run.run_id}
        images = self.config.name_held_out(held_out)
        registered = register(self.run, Registration(name, model_uri, metric, score, images, origin))
        result = "nothing was measured" if score is None else f"{metric} {score:.4g}"
        where = f"[{registered}]({model_link(registered)})" if registered else f"`{model_uri}`"
        describe(self.run, [*self.config.note(self.name), f"Result: {result}, {where}."])
        return registered

    def report(self, make: Callable[[], Report]) -> Path | None:
        """Write the report of the run into its folder, and log it; returns the file, or None, with a warning, if that failed."""
        if file := write_report(self.state.folder, make):
            self.run.log_file(file, "")
            self.run.set_tags({"report": str(file)})
        return file


@contextmanager
def open_job(config: JobConfig, name: str) -> Iterator[Job]:
    """Connect to Ray, and resume the unfinished run of this job and configuration or start one.

    Raises:
        UserError: if MLflow, Ray or a location cannot be used, or a node does not see the job's files.
    """
    outputs = outputs_store(config.outputs) if config.outputs else None
    for field, location in {"work": str(work_folder(config)), **config.shared_folders()}.items():
        if field != "cache.uri":  # a complete cache may be read-only
            with blame_field(field):
                Store.at(location).check_writable()
    uri = resolve_uri(config.tracking.uri, work_folder(config))  # before Ray's processes inherit a password
    state = open_run(config, name)
    with logs.copied_to(state.folder / "log.txt"), connect(config.debug):
        _announce(config, state, uri, outputs)
        print(hardware_line(), flush=True)
        check_shared(config)
        run = _start(config, uri, name, state)
        with _finish(run), _log_hours(run, state), logs.context(run=state.folder.name):
            yield Job(config, name, state, run, uri)
            if outputs:
                run.set_tags({"outputs": publish(state.folder, outputs)})
        # only after everything is sent: the next start of an unfinished run sends the rest
        state.finished = True
        state.save()
        release(state.folder, config.trainings())  # after that: killed in between, the next start would train again


def _announce(config: JobConfig, state: RunState, uri: str, outputs: Store | None) -> None:
    """Print what this start resumes, extends or writes over."""
    print(f"resuming the unfinished run in {state.folder}" if state.resumed else f"new run in {state.folder}")
    print(f"MLflow: {uri}, experiment {config.tracking.experiment}", flush=True)
    if outputs and not state.resumed and (there := outputs.sub(state.folder.name)).folders():
        log.warning("outputs: %s holds results of another run of this name, which this run will replace", there.uri)


def _start(config: JobConfig, uri: str, name: str, state: RunState) -> Run:
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
    return run


@contextmanager
def _log_hours(run: Run, state: RunState) -> Iterator[None]:
    """Log the hours and GPU hours of all starts of a run except those that were killed."""
    started = time.monotonic()
    try:
        yield
    finally:
        try:
            hours, (gpus, kind) = (time.monotonic() - started) / 3600, devices()
            state.hours, state.gpu_hours = state.hours + hours, state.gpu_hours + hours * gpus
            state.save()
            run.set_tags({"device": kind})
            run.log_metric_dict({"hours": state.hours, **({"gpu_hours": state.gpu_hours} if state.gpu_hours else {})})
        except Exception as error:  # noqa: BLE001  must not replace the error that ended the job
            log.warning("the hours of this start are not recorded: %s", one_line(error))


@contextmanager
def _finish(run: Run) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()
