"""Logging of models, and downloads of logged ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from pipeline.errors import UserError, one_line
from pipeline.storage.fetch import temporary_folder
from pipeline.tracking.address import sqlite_file
from pipeline.tracking.nearest import nearest_models, nested_run_with
from pipeline.tracking.run import Run
from pipeline.tracking.sender import is_permanent, retry_until_reachable

STUDENT_FOLDER = "student"
STUDENT_FILES = ("student.safetensors", "student.json")
"""Artifacts of a run that trained a student; :func:`download_student` fetches them."""


def log_student(
    run: Run,
    model: nn.Module,
    example: Tensor,
    *,
    name: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> str:
    """Log a model as a torch.export graph (pt2): without pickle, and loadable without this package.

    Args:
        model: in evaluation mode, on the CPU; takes one float32 tensor.
        example: [B >= 2, ...]; only the batch dimension is dynamic.
        metrics: of the model, for searching; their names must differ from the run's curves.

    Returns:
        The model URI, for `mlflow.pytorch.load_model`.

    Raises:
        UserError: if the server does not answer for minutes.
    """
    run.flush()
    with torch.no_grad():
        output = model(example)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *example.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *output.shape[1:]))]),
    )

    def log() -> str:
        # Without a model, MLflow would create one in the experiment that is active in this process.
        created = run.client.create_logged_model(run.experiment_id, name, run.run_id, dict(tags))
        Model.log(
            artifact_path=None,
            model_id=created.model_id,
            flavor=mlflow.pytorch,
            run_id=run.run_id,
            pytorch_model=model,
            input_example=example.numpy(),
            signature=signature,
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
            serialization_format="pt2",
            validate_serving_input=False,  # it loads the graph again, which takes longer than to log it, and only warns
        )
        return str(created.model_id)

    logged = retry_until_reachable(run.uri, log)
    _log_model_metrics(run, logged, metrics)
    return f"models:/{logged}"


def _log_model_metrics(run: Run, model_id: str, metrics: Mapping[str, float]) -> None:
    for key, value in metrics.items():
        retry_until_reachable(run.uri, partial(run.client.log_metric, run.run_id, key, value, model_id=model_id))


def download_student(model_uri: str, tracking_uri: str, parent: Path | None = None) -> Path:
    """A local folder with `STUDENT_FILES` of the run that logged a model.

    The logged graph is not opened: loading a pt2 file can run its author's code, like a pickle.

    Args:
        model_uri: ``models:/<model id>``, ``models:/<name>/<version>`` (or ``/latest``), ``models:/<name>@<alias>``,
            or ``runs:/<run id>/...``.
        parent: of the folder, as in :func:`~pipeline.storage.fetch.temporary_folder`.

    Raises:
        UserError: if there is no such model, or its run has no exported student.
    """
    client = _client(model_uri, tracking_uri)
    with _nearest_named(client, model_uri, tracking_uri):
        run_id = source_run_id(client, model_uri)
    try:
        folder = Path(client.download_artifacts(run_id, STUDENT_FOLDER, str(temporary_folder(parent))))
        for name in STUDENT_FILES:
            (folder / name).stat()  # some stores return nothing for a missing artifact
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{model_uri} cannot be loaded from {tracking_uri}: {one_line(error)}; students are read from the artifact "
            f"{STUDENT_FOLDER}/{STUDENT_FILES[0]} of the run that logged them, nothing is unpickled"
            f"{nested_run_with(client, run_id, STUDENT_FOLDER)}"
        ) from error
    return folder


def _client(model_uri: str, tracking_uri: str) -> MlflowClient:
    """A client; UserError if the store is a SQLite file that does not exist, which MLflow would create."""
    file = sqlite_file(tracking_uri)
    if file and not file.is_file():
        raise UserError(
            f"{model_uri} cannot be loaded: there is no MLflow store at {tracking_uri}; name the store that has it "
            "(tracking.uri, --tracking-uri)"
        )
    return MlflowClient(tracking_uri)


@contextmanager
def _nearest_named(client: MlflowClient, model_uri: str, tracking_uri: str) -> Iterator[None]:
    """Turn MLflow's error on a URI into a UserError that names what the store holds instead."""
    try:
        yield
    except MlflowException as error:
        name = _split_uri(model_uri)[1].partition("@")[0]
        hint = f"; {nearest_models(client, name)}" if is_permanent(error) else ""
        raise UserError(f"{model_uri} cannot be loaded from {tracking_uri}: {one_line(error)}{hint}") from error


def source_run_id(client: MlflowClient, model_uri: str) -> str:
    """The run that logged a model; MlflowException if there is no such model or run."""
    scheme, head, _ = _split_uri(model_uri)
    if scheme == "runs" and head:
        return str(client.get_run(head).info.run_id)
    if scheme != "models" or not head:
        raise MlflowException("it is neither models:/... nor runs:/...")
    version = _version(client, model_uri)
    return str(version.run_id if version else client.get_logged_model(head).source_run_id)


def _split_uri(model_uri: str) -> tuple[str, str, str]:
    """Scheme, first part and rest of a URI."""
    scheme, _, rest = model_uri.partition(":/")
    head, _, tail = rest.strip("/").partition("/")
    return scheme, head, tail


def _version(client: MlflowClient, model_uri: str) -> ModelVersion | None:
    """The registered version that a URI with a version or alias names; None for any other URI."""
    scheme, head, tail = _split_uri(model_uri)
    name, _, alias = head.partition("@")
    alias = alias or ("latest" if tail == "latest" else "")
    if scheme != "models" or not (tail or alias):
        return None
    return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, tail)


def log_model_folder(
    run: Run, folder: Path, *, name: str, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> str:
    """As :func:`log_student`, for a model that torch.export does not support: its files, for :func:`download_model`."""
    run.flush()
    create = partial(run.client.create_logged_model, run.experiment_id, name, run.run_id, dict(tags))
    logged = retry_until_reachable(run.uri, create)
    retry_until_reachable(run.uri, partial(run.client.log_model_artifacts, logged.model_id, str(folder)))
    retry_until_reachable(run.uri, partial(run.client.finalize_logged_model, logged.model_id, "READY"))
    _log_model_metrics(run, logged.model_id, metrics)
    return f"models:/{logged.model_id}"


def download_model(model_uri: str, tracking_uri: str) -> Path:
    """A local folder with the files of a logged model; UserError if there is no such model."""
    client = _client(model_uri, tracking_uri)
    with _nearest_named(client, model_uri, tracking_uri):
        location = _location(client, model_uri)
    try:
        return Path(mlflow.artifacts.download_artifacts(location, tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        scheme, run_id, folder = _split_uri(location)
        hint = nested_run_with(client, run_id, folder) if scheme == "runs" else ""
        raise UserError(f"{model_uri} cannot be loaded from {tracking_uri}: {one_line(error)}{hint}") from error


def _location(client: MlflowClient, model_uri: str) -> str:
    """The location of a model's files; MLflow's own lookup uses a global store instead of the client's."""
    version = _version(client, model_uri)
    source = str(version.source) if version else model_uri
    if source.startswith("runs:/"):
        source_run_id(client, source)
    scheme, logged, tail = _split_uri(source)
    return str(client.get_logged_model(logged).artifact_location) if scheme == "models" and not tail else source
