"""The tracking URI, without passwords, because URIs are printed, logged and sent to workers.

A password in MLFLOW_TRACKING_URI is moved into the environment variable that MLflow or the database driver reads.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UserError

_SECRET = re.compile("password|token|secret", re.IGNORECASE)
_REMEDY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (a server) or PGPASSWORD (PostgreSQL)"


def resolve_uri(configured: str | None, work: Path, field: str = "tracking.uri") -> str:
    """The tracking URI: the one configured in `field` (or flag), else MLFLOW_TRACKING_URI, else SQLite in the work folder.

    Raises:
        UserError: if the configured URI holds a password, or the one in MLFLOW_TRACKING_URI cannot be moved; the message does
            not repeat the password.
    """
    if configured and _has_password(configured):
        raise UserError(f"{field}: a password in an address is refused, since configurations are logged; {_REMEDY}")
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and _has_password(given):
        given = os.environ["MLFLOW_TRACKING_URI"] = _without_password(given)
    return configured or given or sqlite_uri(work / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite store in a file; `%` and `?` in its path have a meaning in a URI, and are escaped."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for a store of another kind."""
    path = uri.partition("?")[0].removeprefix("sqlite:///")
    return Path(unquote(path)) if uri.startswith("sqlite:///") else None


def _has_password(uri: str) -> bool:
    parts = urlsplit(uri)
    return bool(parts.password or _SECRET.search(parts.query))


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    user, host = parts.username or "", parts.netloc.rpartition("@")[2]
    if parts.password and not _SECRET.search(parts.query):
        if parts.scheme in ("http", "https"):
            os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
            os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
            return parts._replace(netloc=host).geturl()
        if parts.scheme.partition("+")[0] in ("postgresql", "postgres"):
            os.environ["PGPASSWORD"] = unquote(parts.password)
            return parts._replace(netloc=f"{user}@{host}").geturl()
    raise UserError(f"MLFLOW_TRACKING_URI: the password in it would be logged; {_REMEDY}")
