"""Files that jobs read, by local path or by URI: what exists, what folders hold, and the bytes.

Failures of a store are retried (`pipeline.storage.remote.attempt`) and end as `StoreError`, a line with URI, reason and remedy.
Local files raise OSError as Python's own functions do.
"""

import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.storage.remote import attempt, fsspec_driver, is_uri, is_web, list_infos, resolve
from pipeline.storage.remote_file import BLOCK, RemoteFile

HEADER = 1 << 16
"""Bytes of one request for a file of which only the first bytes are needed."""
THREADS = 16
"""Requests at the same time, since each waits for the network."""
NO_LISTING = (
    "a web server has no folders that can be listed; copy the folder to s3://, gs://, az:// or hf://, or name .tar or .parquet "
    "files, several with braces (https://host/train-{000..127}.tar)"
)
"""What is wrong with a folder or a glob of a web server, and the remedy."""

_TAGS = ("ETag", "etag", "blob_id", "oid", "LastModified", "last_modified", "Last-Modified", "mtime", "created")
"""What drivers of fsspec know of the version of a file, the best first."""


class Entry(NamedTuple):
    """A file or a folder.

    Attributes:
        path: local path or URI.
        size: in bytes; 0 for a folder.
        version: 64-bit digest of size and modification time or ETag; where it differs, the content may differ.
    """

    path: str
    is_folder: bool
    size: int
    version: int


def describe(path: str) -> Entry:
    """The file or folder at a local path or URI.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if the store fails; OSError if a local file cannot be looked at.
    """
    if is_uri(path):
        return attempt("read", path, lambda: _describe(path))
    info = os.stat(path)
    return Entry(path, stat.S_ISDIR(info.st_mode), info.st_size, _version(info.st_mtime_ns, info.st_size))


def stat_local(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and modification times in nanoseconds of local files, int64; 0 and -1 for one that cannot be looked at, such as a
    broken link.

    The system is asked for all of them outside the interpreter's lock, so that threads wait for it at the same time.

    Raises:
        UnicodeEncodeError: if a path is not valid UTF-8.
    """
    found = _local_infos(paths)
    sizes, times = [info.size for info in found], [info.mtime_ns for info in found]
    if None in sizes or None in times:
        sizes, times = [size or 0 for size in sizes], [-1 if time is None else time for time in times]
    return np.array(sizes, np.int64), np.array(times, np.int64)


def local_versions(sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The versions (:class:`Entry`) of local files from what `stat_local` gives, int64; 0 for one that cannot be looked at."""
    blake2b, tags = hashlib.blake2b, map(b"%d %d".__mod__, zip(times.tolist(), sizes.tolist(), strict=True))
    versions = np.frombuffer(b"".join([blake2b(tag, digest_size=8).digest() for tag in tags]), "<i8")
    return np.where(times == -1, 0, versions)


def _local_infos(paths: Sequence[str]) -> list[fs.FileInfo]:
    try:
        found: list[fs.FileInfo] = fs.LocalFileSystem().get_file_info(paths)
        return found
    except OSError:  # one of them fails all
        if len(paths) == 1:
            return [fs.FileInfo(paths[0])]
        return [info for path in paths for info in _local_infos([path])]


def exists(path: str) -> bool:
    """Whether there is a file or folder at a local path or URI; StoreError if the store fails."""
    if not is_uri(path):
        return os.path.exists(path)
    try:
        describe(path)
    except FileNotFoundError:
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether a local path or URI is a folder; what a web server holds is none."""
    if not is_uri(path):
        return os.path.isdir(path)
    try:
        return not is_web(path) and describe(path).is_folder
    except FileNotFoundError:
        return False


def list_folder(uri: str, *, recursive: bool = False) -> list[Entry]:
    """What the folder of a store holds, sorted; `recursive`: all files below, in one listing, and no folders.

    Raises:
        UserError: if there is no such folder, or the store cannot list it.
    """
    if is_web(uri):
        raise UserError(f"{uri}: {NO_LISTING}")
    try:
        return sorted(attempt("list", uri, lambda: list(_list(uri, recursive))))
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such folder; correct the address") from error


def open_binary(path: str, block: int = BLOCK) -> BinaryIO:
    """A file for reading; by URI with retries, in requests of `block` bytes or, where more is read at once, of that.

    Raises:
        FileNotFoundError: if it does not exist.
        StoreError: if the store fails; also when reading.
        OSError: for a local path that is no regular file: reading a pipe may block, reading a device may never end.
    """
    if not is_uri(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path}: not a regular file")
        return open(path, "rb")
    return io.BufferedReader(RemoteFile(path), block)


def read_bytes(path: str) -> bytes:
    """The bytes of a file, by local path or URI; raises as :func:`open_binary`."""
    with open_binary(path) as file:
        return file.read()


def _describe(uri: str) -> Entry:
    system, path = resolve(uri)
    driver = fsspec_driver(system)
    if driver is not None:
        return _entry(uri, driver.info(path))
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return _arrow_entry(uri, info)


def _list(uri: str, recursive: bool) -> Iterator[Entry]:
    system, root = resolve(uri)
    driver = fsspec_driver(system)
    if driver is None:
        selector = fs.FileSelector(root, recursive=True)
        for info in system.get_file_info(selector) if recursive else list_infos(system, root):
            entry = _arrow_entry(uri + info.path[len(root) :], info)
            if not (recursive and entry.is_folder):
                yield entry
        return
    found = driver.find(root, detail=True).values() if recursive else driver.ls(root, detail=True)
    if recursive and not found and not driver.isdir(root):
        raise FileNotFoundError(root)
    for item in found:
        name = item["name"].rstrip("/")
        if name != root.rstrip("/"):
            yield _entry(uri + name.removeprefix(root.rstrip("/")), item)


def _arrow_entry(uri: str, info: fs.FileInfo) -> Entry:
    if info.type == fs.FileType.Directory:
        return Entry(uri, True, 0, 0)
    return Entry(uri, False, info.size, _version(info.mtime_ns, info.size))


def _entry(uri: str, info: Mapping[str, Any]) -> Entry:
    if info["type"] == "directory":
        return Entry(uri, True, 0, 0)
    tag = next((info[name] for name in _TAGS if info.get(name)), "")
    return Entry(uri, False, info["size"] or 0, _version(tag, info["size"]))


def _version(tag: Any, size: int) -> int:
    return int.from_bytes(_digest(f"{tag} {size}".encode()), "little", signed=True)


def _digest(tag: bytes) -> bytes:
    return hashlib.blake2b(tag, digest_size=8).digest()
