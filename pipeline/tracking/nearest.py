"""What a store holds where a URI names no model in it, for the messages of errors."""

import difflib
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn

LISTED = 5
"""Most names, and most versions of each."""
PAGE = 1000


def nearest_models(client: MlflowClient, name: str) -> str:
    """The versions of a registered model, or else the registered models with the most similar names, most similar first."""
    models = {model.name: model for model in _registered(client)}
    if not models:
        return "no model is registered there; if it is in another store, name that one (tracking.uri, --tracking-uri)"
    if name in models:
        return f"there are {', '.join(_uris(client, models[name]))}"
    near = difflib.get_close_matches(name, models, n=LISTED, cutoff=0.0)
    more = f", and {len(models) - len(near)} more" if len(models) > len(near) else ""
    return f"there are {', '.join(uri for found in near for uri in _uris(client, models[found]))}{more}"


def nested_run_with(client: MlflowClient, run_id: str, folder: str) -> str:
    """A question that names the nested run with this artifact folder, since a job is a run of nested ones; "" if none has it."""
    try:
        experiment = client.get_run(run_id).info.experiment_id
        nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
        found = [run.info.run_id for run in nested if client.list_artifacts(run.info.run_id, folder)]
    except MlflowException:  # an error is being reported already
        return ""
    return f"; did you mean runs:/{found[0]}/{folder}?" if found else ""


def _registered(client: MlflowClient) -> list[RegisteredModel]:
    found: list[RegisteredModel] = get_results_from_paginated_fn(
        lambda most, token: client.search_registered_models(max_results=most, page_token=token), PAGE
    )
    return found


def _uris(client: MlflowClient, model: RegisteredModel) -> Iterator[str]:
    """The URIs of the latest versions, latest first, with their aliases."""
    quote = '"' if "'" in model.name else "'"
    try:
        versions = list(client.search_model_versions(f"name = {quote}{model.name}{quote}"))
    except MlflowException:  # a name with both quotes
        versions = []
    # A search leaves the aliases out; the model itself has them.
    aliases = client.get_registered_model(model.name).aliases
    for version in sorted(versions, key=lambda version: -int(version.version))[:LISTED]:
        own = [f"@{alias}" for alias, number in aliases.items() if int(number) == int(version.version)]
        yield f"models:/{model.name}/{version.version}" + (f" ({', '.join(own)})" if own else "")
    if not versions:
        yield f"{model.name} (without a version)"
