"""Local copies of models in MLflow or an object store; only the driver fetches, so that workers need no credentials."""

from pathlib import Path

from pipeline.storage.fetch import fetch


def is_model_uri(name: str) -> bool:
    """Whether MLflow resolves a name."""
    return name.startswith(("models:/", "runs:/", "mlflow-artifacts:/"))


def fetch_student(name: str, tracking_uri: str, parent: Path | None = None) -> str:
    """The path of a local copy of an exported student's MLflow URI or address (`s3://...`); any other name unchanged.

    Args:
        parent: of the copy, such as a folder that all nodes see; None: the system's temporary folder.

    Raises:
        UserError: if it does not exist or cannot be reached.
    """
    if is_model_uri(name):
        from pipeline.tracking.models import download_student

        return str(download_student(name, tracking_uri, parent))
    return str(fetch(name, parent)) if "://" in name else name


def fetch_model(name: str, tracking_uri: str) -> Path:
    """The folder of a model: a path, or a local copy of an address or MLflow URI; UserError if it cannot be reached."""
    if is_model_uri(name):
        from pipeline.tracking.models import download_model

        return download_model(name, tracking_uri)
    return fetch(name) if "://" in name else Path(name).expanduser()
