"""File systems of object stores, and one retry rule for all of them.

Credentials come from the environment or the machine's role, never from a URI, because URIs are logged.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
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
}
_REFUSED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidToken|ExpiredToken|HTTP status 40[0-3]"
    "|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2 access token"
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def check_address(uri: str) -> None:
    """Raise `UserError` if a URI contains credentials or options; the message does not repeat them."""
    scheme, _, rest = uri.partition("://")
    if "@" in rest and (scheme in _REMEDIES or ":" in rest.split("@")[0]):
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
        return _s3(root.split("/")[0], endpoint), root
    if scheme == "gs":
        return _gcs(), root
    try:
        # Without the listings cache, the driver sees what other processes have written since.
        filesystem, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        raise UserError(f"{uri} needs a driver that is not installed: {error}") from error
    except ValueError as error:
        raise UserError(f"{uri}: {error}; use a local folder, s3://, gs:// or a scheme that fsspec knows") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


@lru_cache
def _s3(bucket: str, endpoint: str | None) -> fs.S3FileSystem:
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
def _gcs() -> fs.GcsFileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=STALL_TIMEOUT_S))


def attempt(doing: str, uri: str, call: Callable[[], Result]) -> Result:
    """Return `call()`, retried with exponential, randomised pauses while its failure may be temporary.

    `doing` is the verb for messages about `uri`, such as ``read``.

    Raises:
        FileNotFoundError: immediately.
        UserError: immediately for permanent failures, otherwise after `ATTEMPTS` failures.
    """
    for failures in range(1, ATTEMPTS + 1):
        try:
            return call()
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowInvalid, NotImplementedError) as error:
            remedy = _permanent(error, uri.partition("://")[0])
            # Google's driver appends its whole state to the message.
            reason = str(error).strip().partition("\n")[0].partition(" error_info=")[0]
            if remedy or failures == ATTEMPTS:
                remedy = remedy or f"tried {ATTEMPTS} times; check the network, and run the same command again"
                raise UserError(f"cannot {doing} {uri}: {reason}; {remedy}") from error
            pause = FIRST_DELAY_S * 2 ** (failures - 1) * random.uniform(0.5, 1)
            log.warning("cannot %s %s: %s; trying again in %.1f s", doing, uri, reason, pause)
            time.sleep(pause)
    raise AssertionError


def _permanent(error: Exception, scheme: str) -> str:
    """The remedy for a permanent failure, or ""."""
    if isinstance(error, PermissionError) or _REFUSED.search(str(error)):
        return _remedy(scheme)
    if "NO_SUCH_BUCKET" in str(error):
        return "create the bucket, or correct its name"
    if not isinstance(error, OSError):
        return "correct the address"
    return ""


def _remedy(scheme: str) -> str:
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
