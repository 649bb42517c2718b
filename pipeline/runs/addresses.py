"""Local copies of models that lie in MLflow or an object store, for code that reads folders.

Only the driver fetches: workers of a cluster need neither MLflow nor its credentials.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.storage.fetch import fetch


def is_model_uri(name: str) -> bool:
    """Whether MLflow resolves a name."""
    return name.startswith(("models:/", "runs:/", "mlflow-artifacts:/"))


def fetch_student(name: str, tracking_uri: str, parent: Path | None = None) -> str:
    """The path of a local copy if a name is an MLflow URI or an address (`s3://...`) of an exported student, else the name.

    Args:
        parent: folder that the copy is made in, such as one that all nodes see; None: the system's temporary folder.

    Raises:
        UserError: if nothing is there, or it cannot be reached.
    """
    if is_model_uri(name):
        from pipeline.tracking.models import download_student

        return str(download_student(name, tracking_uri, parent))
    return str(fetch(name, parent)) if "://" in name else name


def fetch_model(name: str, tracking_uri: str) -> Path:
    """The folder that a path, an address or the MLflow URI of a logged model names; the last two are copied.

    Raises:
        UserError: if nothing is there, or it cannot be reached.
    """
    if is_model_uri(name):
        from pipeline.tracking.models import download_model

        return download_model(name, tracking_uri)
    return fetch(name) if "://" in name else Path(name).expanduser()
