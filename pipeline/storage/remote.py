"""File systems of object stores, and one retry rule for all of them.

Credentials come from the environment or the machine's role, never from a URI, because URIs are logged.
"""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError

ATTEMPTS = 6
"""Attempts at an operation; within each, the driver itself retries."""
FIRST_DELAY_S = 1.0
"""Longest pause after the first failure in seconds; it doubles with every further failure."""
CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 20.0

_REMEDIES = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_ENDPOINT_URL, or the role of the machine",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or the role of the machine",
    "hf": "check the name and HF_TOKEN, or run `hf auth login`",
    "https": "name a file that anybody may read, or copy it to a store that has credentials",
}
_REFUSED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidToken|ExpiredToken|HTTP status 40[0-3]"
    "|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2 access token"
)

_NO_BUCKET = re.compile("NO_SUCH_BUCKET|Bucket '.*' not found")
_DRIVERS = ("aiohttp", "azure", "fsspec", "httpx2", "huggingface_hub")
"""Packages whose exceptions are failures of a store, whatever their classes."""
_TIMES = ("mtime", "last_modified", "LastModified", "created")
"""What drivers of fsspec call the modification time, the best first."""
_NOT_FOUND = (404, 410)
_PASSING = (408, 425, 429)
"""HTTP statuses below 500 that may be temporary."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class StoreError(UserError):
    """A store does not answer, or refuses; nothing is known about the file that was asked for."""


def is_uri(path: str) -> bool:
    """Whether this is the URI of a store rather than a local path."""
    return "://" in path


def is_web(uri: str) -> bool:
    """Whether this is a file on a web server, which has no folders that can be listed."""
    return uri.startswith(("http://", "https://"))


def check_address(uri: str) -> None:
    """Raise `UserError` if a URI contains credentials or options; the message does not repeat them."""
    scheme, _, rest = uri.partition("://")
    if is_web(uri) and ("?" in rest or "@" in rest.split("/")[0]):
        raise UserError(
            f"credentials and options in an {scheme}:// address are refused, since addresses are logged; {_remedy(scheme)}"
        )
    if "@" in rest and (scheme in ("s3", "gs") or ":" in rest.split("@")[0]):
        raise UserError(f"credentials in an address are refused, since addresses are logged; {_remedy(scheme)}")
    if "?" in rest:
        raise UserError(
            f"options after ? in an {scheme}:// address are not read; AWS_ENDPOINT_URL names an S3-compatible endpoint"
        )


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path within it; connections are shared within a process.

    Raises:
        UserError: if no driver for it is installed, or AWS_ENDPOINT_URL is malformed.
        OSError: if the region of the bucket cannot be determined.
    """
    scheme, _, root = uri.partition("://")
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _s3(root.split("/")[0], endpoint, os.getpid()), root
    if scheme == "gs":
        return _gcs(os.getpid()), root
    try:
        filesystem, path = fsspec.url_to_fs(uri, **_options(scheme))
    except ImportError as error:
        raise UserError(f"{uri} needs a driver that is not installed: {error}") from error
    except ValueError as error:
        known = scheme in fsspec.available_protocols()  # then its credentials are missing
        remedy = _remedy(scheme) if known else "use a local folder, s3://, gs:// or a scheme that fsspec knows"
        raise UserError(f"{uri}: {error}; {remedy}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def fsspec_driver(system: fs.FileSystem) -> Any:
    """The driver of fsspec below what :func:`resolve` gives, or None for those of pyarrow."""
    return system.handler.fs if isinstance(system, fs.PyFileSystem) else None


def list_infos(system: fs.FileSystem, folder: str, *, missing: bool = False) -> list[fs.FileInfo]:
    """What a folder of a file system holds; `missing`: one that does not exist holds nothing.

    Of Google's store pyarrow names only folders that have an object of their own as a marker, which uploads do not make: they are
    found in the names of all objects below, at the price of listing these. A driver of fsspec is asked itself: pyarrow asks it to
    find files to a depth of one, which adlfs does not heed, and passes on the modification time under one of its names alone.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if isinstance(system, fs.GcsFileSystem):
        return _list_gcs(system, folder, missing)
    driver = fsspec_driver(system)
    try:
        if driver is None:
            return list(system.get_file_info(fs.FileSelector(folder, allow_not_found=missing)))
        items = driver.ls(folder, detail=True)
    except FileNotFoundError:
        # Also of pyarrow: it looks again for a folder that it could not open, and another process may have made it meanwhile.
        if missing:
            return []
        raise
    return [_driver_info(item) for item in items if item["name"].strip("/") != folder.strip("/")]


def _driver_info(item: Mapping[str, Any]) -> fs.FileInfo:
    """A file or folder as a driver of fsspec describes it."""
    path = item["name"].rstrip("/")
    if item["type"] == "directory":
        return fs.FileInfo(path, fs.FileType.Directory)
    modified = next((item[name] for name in _TIMES if item.get(name)), None)
    time_s = modified if isinstance(modified, (float, datetime)) else None
    return fs.FileInfo(path, fs.FileType.File, size=item["size"], mtime=time_s)


def _list_gcs(system: fs.GcsFileSystem, folder: str, missing: bool) -> list[fs.FileInfo]:
    found, start = dict[str, fs.FileInfo](), len(folder.rstrip("/")) + 1
    infos = system.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
    if not (infos or missing) and system.get_file_info(folder).type == fs.FileType.NotFound:
        raise FileNotFoundError(folder)  # pyarrow's own error here is of no such kind
    for info in infos:
        name, below, _ = info.path[start:].partition("/")
        path = info.path[:start] + name
        found.setdefault(path, fs.FileInfo(path, fs.FileType.Directory) if below else info)
    return [*found.values()]


def _options(scheme: str) -> dict[str, Any]:
    """Arguments of a driver of fsspec."""
    if scheme == "hf":
        return {}  # its listings save requests to the hub, which limits their rate
    # Without the listings cache, the driver sees what other processes have written since.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("http", "https"):
        import aiohttp  # half a second, which few processes need

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return options


# A forked process must not write to the connections of its parent; fsspec sees to that for its drivers.
@lru_cache
def _s3(bucket: str, endpoint: str | None, process: int) -> fs.S3FileSystem:
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": STALL_TIMEOUT_S,
        # Small objects then take one request instead of three.
        "allow_delayed_open": True,
        # Bridges failures of milliseconds, part by part; `attempt` waits for longer ones.
        "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=2),
    }
    if not endpoint:
        return fs.S3FileSystem(region=fs.resolve_s3_region(bucket), **options)
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc or address.path.strip("/"):
        raise UserError("AWS_ENDPOINT_URL is no address of the form http://host:port or https://host:port")
    return fs.S3FileSystem(endpoint_override=address.netloc, scheme=address.scheme, **options)


@lru_cache
def _gcs(process: int) -> fs.GcsFileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=STALL_TIMEOUT_S))


def attempt(doing: str, uri: str, call: Callable[[], Result]) -> Result:
    """Return `call()`, retried with exponential, randomised pauses while its failure may be temporary.

    `doing` is the verb for messages about `uri`, such as ``read``.

    Raises:
        FileNotFoundError: immediately.
        StoreError: immediately for permanent failures, otherwise after `ATTEMPTS` failures.
    """
    for failures in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
            if not (isinstance(cause, (OSError, pa.ArrowInvalid, NotImplementedError)) or _of_driver(cause)):
                raise
            remedy = _permanent(cause, uri.partition("://")[0])
            if remedy or failures == ATTEMPTS:
                remedy = remedy or f"tried {ATTEMPTS} times; check the network, and run the same command again"
                raise StoreError(f"cannot {doing} {uri}: {_reason(cause)}; {remedy}") from error
            pause = FIRST_DELAY_S * 2 ** (failures - 1) * random.uniform(0.5, 1)
            log.warning("cannot %s %s: %s; trying again in %.1f s", doing, uri, _reason(cause), pause)
            time.sleep(pause)
    raise AssertionError


def _cause(error: Exception) -> Exception:
    """The failure itself: fsspec's HTTP driver reports each failure as a missing file, others a missing file by its status."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError):
        failed = isinstance(cause, OSError) or (isinstance(cause, Exception) and _package(cause) == "aiohttp")
        return cause if isinstance(cause, Exception) and failed and _status(cause) not in _NOT_FOUND else error
    return FileNotFoundError(str(error)) if _status(error) in _NOT_FOUND else error


def _of_driver(error: Exception) -> bool:
    return _package(error) in _DRIVERS


def _package(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _status(error: Exception) -> int | None:
    """The HTTP status that the exception of a driver holds."""
    response = getattr(error, "response", None)
    found = (
        getattr(error, "status", None),
        getattr(error, "status_code", None),
        getattr(response, "status_code", None),
    )
    return next((status for status in found if isinstance(status, int)), None)


def _reason(error: Exception) -> str:
    # Google's driver appends its whole state to the message.
    text = str(error).strip().partition("\n")[0].partition(" error_info=")[0]
    return text or type(error).__name__


def _permanent(error: Exception, scheme: str) -> str:
    """The remedy for a permanent failure, or ""."""
    status = _status(error) or 0
    if isinstance(error, PermissionError) or status in (401, 403) or _REFUSED.search(str(error)):
        return _remedy(scheme)
    if _NO_BUCKET.search(str(error)):
        return "create the bucket, or correct its name"
    if "HF_HUB_OFFLINE" in str(error):
        return "or read a local copy"
    senseless = isinstance(error, ValueError) or not (isinstance(error, OSError) or _of_driver(error))
    if senseless or (400 <= status < 500 and status not in _PASSING):
        return "correct the address"
    return ""


def _remedy(scheme: str) -> str:
    scheme = {"http": "https", "abfs": "az", "abfss": "az"}.get(scheme, scheme)
    return _REMEDIES.get(scheme, f"check the environment variables that the {scheme}:// driver reads")


class RetriedFile:
    """A file for `pyarrow.PythonFile` whose reads are retried by :func:`attempt`."""

    def __init__(self, file: pa.NativeFile, uri: str) -> None:
        self._file, self._uri = file, uri

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read_buffer(self, size: int) -> pa.Buffer:
        """The next `size` bytes, fewer at the end of the file, without a copy."""
        start = self._file.tell()

        def read() -> pa.Buffer:
            self._file.seek(start)
            return self._file.read_buffer(size)

        return attempt("read", self._uri, read)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        return self.read_buffer(size).to_pybytes()
