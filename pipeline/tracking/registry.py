"""Models in MLflow's registry, and descriptions of runs.

MLflow maintains `models:/<name>/latest`; this module sets `models:/<name>@best` and links to it at the top of the
experiment's description.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.errors import one_line
from pipeline.tracking.models import source_run_id
from pipeline.tracking.run import NOTE, Run, run_link

BEST, EXPERIMENT = "best", "experiment"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registration:
    """A model to register.

    Attributes:
        name: of the registered model, without slash or colon.
        model_uri: of the logged model.
        metric, score: for comparing versions; higher is better; None: not measured, so that it is never the best.
        held_out: identity of the images that the score was measured on; scores on other images are not comparable.
        lineage: the model's origin, by tag: teachers, licences, images, manifests.
    """

    name: str
    model_uri: str
    metric: str
    score: float | None
    held_out: str = ""
    lineage: Mapping[str, str] = field(default_factory=dict)


def register(run: Run, registration: Registration) -> str | None:
    """Register a model as the next version, and mark the best among versions with the same metric and images.

    A resumed run keeps the version that it has registered. The version's description links to `run`, that of the job.

    Returns:
        ``models:/<name>/<version>``; None, with a warning, if the store fails or has no registry.
    """
    try:
        version = _create(run, registration)
    except (MlflowException, OSError) as error:
        log.warning(
            f"the model is logged as {registration.model_uri} but not registered as {registration.name}: {one_line(error)}"
        )
        return None
    registered = f"models:/{registration.name}/{version.version}"
    try:
        _mark_best(run.client, registration, registered)
        _show_best(run)
    except (MlflowException, OSError) as error:
        log.warning("the model is registered as %s, but the best one was not marked: %s", registered, one_line(error))
    return registered


def _create(run: Run, registration: Registration) -> ModelVersion:
    client, trained_by = run.client, source_run_id(run.client, registration.model_uri)
    try:
        client.create_registered_model(registration.name, description=_MODEL_NOTE.format(**vars(registration)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if registered := client.search_model_versions(f"name = '{registration.name}' and run_id = '{trained_by}'"):
        return registered[0]
    score = (
        {} if registration.score is None else {"score": f"{registration.score:.6g}", "held_out": registration.held_out}
    )
    logged = registration.model_uri.removeprefix("models:/")
    return client.create_model_version(
        registration.name,
        registration.model_uri,
        trained_by,
        tags={"metric": registration.metric, EXPERIMENT: run.experiment_id, **score, **registration.lineage},
        description=_version_note(run, registration),
        model_id=logged if "/" not in logged else None,
    )


def _mark_best(client: MlflowClient, registration: Registration, registered: str) -> None:
    """Set the alias to the best version with the same metric and images, the earliest of equals.

    An alias of a version with another metric or images stays there.
    """
    if registration.score is None:
        return
    measured = (registration.metric, registration.held_out)
    marked = client.get_registered_model(registration.name).aliases.get(BEST)
    if marked is not None and _measured(client.get_model_version(registration.name, str(marked))) != measured:
        log.warning(
            f"{registered} was measured on other images ({registration.held_out}) than the best version, {marked}, which "
            f"keeps the alias `{BEST}` until it is deleted"
        )
        return
    alike = [
        (float(version.tags["score"]), -int(version.version), version)
        for version in client.search_model_versions(f"name = '{registration.name}'")
        if "score" in version.tags and _measured(version) == measured
    ]
    best = max(alike, key=lambda entry: entry[:2])[2]
    client.set_registered_model_alias(registration.name, BEST, str(best.version))


def _measured(version: ModelVersion) -> tuple[str | None, str | None]:
    """Metric and held-out images of a version's score."""
    return version.tags.get("metric"), version.tags.get("held_out")


def _show_best(run: Run) -> None:
    """Put the best version of each model at the top of the experiment's description."""
    names = {version.name for version in run.client.search_model_versions(f"tags.{EXPERIMENT} = '{run.experiment_id}'")}
    found = [run.client.get_registered_model(name) for name in sorted(names)]
    best = [run.client.get_model_version(model.name, model.aliases[BEST]) for model in found if BEST in model.aliases]
    if not best:
        return
    shown = [
        f"[{version.name} {version.version}]({model_link(f'models:/{version.name}/{version.version}')})"
        f" ({version.tags['metric']} {float(version.tags['score']):.4g})"
        for version in best
    ]
    note = run.client.get_experiment(run.experiment_id).tags.get(NOTE, "")
    rest = note.partition("\n")[2] if note.startswith(_BEST) else f"\n{note}"
    run.client.set_experiment_tag(run.experiment_id, NOTE, f"{_BEST}{' · '.join(shown)}\n{rest}")


_BEST = "Best: "
_FOR_PROGRAMS = ("manifests", "run", "distilled_in")
"""Beginnings of the tags that hold ids and hashes, which the text leaves out."""
_MODEL_NOTE = """Newest: `models:/{name}/latest`. Best by `{metric}`: `models:/{name}@best`, among versions measured on the
same held-out images (tag `held_out`) as the first marked version."""


def _version_note(run: Run, registration: Registration) -> str:
    score = "nothing was measured" if registration.score is None else f"{registration.metric} {registration.score:.4g}"
    rows = [
        f"| {name} | {value} |" for name, value in registration.lineage.items() if not name.startswith(_FOR_PROGRAMS)
    ]
    table = ["| | |", "|---|---|", *rows, ""] if rows else []
    more = "The tags name what programs look up: the run, and the artifacts with the hashes of the cache's files."
    return "\n".join([f"From [the job's run]({run_link(run)}): {score}.", "", *table, more])


def describe(run: Run, lines: Sequence[str]) -> None:
    """Set the description of a run, in Markdown."""
    run.set_tags({NOTE: "\n\n".join(lines)})


def model_link(registered: str) -> str:
    """Link to ``models:/<name>/<version>`` that works on every page of the interface."""
    name, _, version = registered.removeprefix("models:/").rpartition("/")
    return f"#/models/{name}/versions/{version}"
