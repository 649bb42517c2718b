"""A folder, local or in an object store, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError, one_line
from pipeline.storage.atomic import atomic_write
from pipeline.storage.remote import RetriedFile, attempt, check_address, resolve

LEFTOVER_AGE_S = 3600.0
"""Age in seconds at which a temporary file counts as left by a killed writer."""

_TRIAL = "write-trial"
"""File that is written and deleted to test that a destination is writable."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Store:
    """Reads and atomically writes the files below `uri`. Picklable.

    Operations on object stores are retried if the failure may be temporary (`pipeline.storage.remote.attempt`). Every
    operation raises UserError if the store is unreachable or refuses it, and FileNotFoundError for a missing file.

    Attributes:
        uri: an absolute local path, ``s3://bucket/folder``, ``gs://bucket/folder``, or the URI of another store that fsspec
            supports. It is taken literally: nothing in it is percent-encoded.
    """

    uri: str

    @classmethod
    def at(cls, location: str | Path) -> Store:
        """The store at a local path (made absolute) or a URI.

        Raises:
            UserError: if the URI contains credentials or options.
        """
        text = str(location)
        if text.startswith("file://"):
            text = url2pathname(urlsplit(text).path)
        if "://" not in text:
            return cls(str(Path(text).expanduser().resolve()))
        check_address(text)
        return cls(text.rstrip("/"))

    def sub(self, folder: str) -> Store:
        """The store of a folder below this one."""
        return Store(f"{self.uri}/{folder}")

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's file system."""
        return "://" not in self.uri

    def check(self) -> None:
        """Check early that an object store can be used.

        Raises:
            UserError: if the driver, the endpoint, the bucket or the permission to list it is missing.
        """
        if self._list() or not self.uri.startswith("s3://"):
            return
        bucket = "/".join(self.uri.split("/")[:3])
        if Store(bucket)._info("").type == fs.FileType.NotFound:
            raise UserError(f"{bucket} does not exist: create the bucket, or correct its name")

    def check_writable(self) -> None:
        """Check early that files can be written and deleted here; creates a missing local folder.

        Raises:
            UserError: as `check`, or if a write is refused.
        """
        self.check()
        try:
            self.put(_TRIAL, b"")
            self.delete(_TRIAL)
        except UserError as error:
            raise UserError(f"{error}; name a writable location") from error

    def free_bytes(self) -> int | None:
        """Free space in bytes at a local folder, which need not exist; None for object stores."""
        if not self.is_local:
            return None
        folder = Path(self.uri)
        return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file so that readers see all of it or none, even after a crash or a power cut.

        Raises:
            UserError: if the destination is full, read-only or otherwise refuses the write.
        """
        try:
            if self.is_local:
                self._run("write", path, lambda _, target: _write_local(target, data))
            else:
                self._run("write", path, lambda system, target: _upload(system, target, data))
        except FileNotFoundError as error:
            raise UserError(f"cannot write {self.uri}/{path}: no such bucket or folder") from error

    def get(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        return self._run("read", path, _download)

    def open(self, path: str) -> pa.NativeFile:
        """A file for random access.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        if self.is_local:
            # Not memory-mapped: a failing disk or a truncated file would kill the process instead of raising an error.
            return self._run("read", path, lambda _, target: pa.OSFile(target))
        file = self._run("read", path, lambda system, target: system.open_input_file(target))
        return pa.PythonFile(RetriedFile(file, f"{self.uri}/{path}"), mode="r")

    def exists(self, path: str) -> bool:
        """Whether a file exists."""
        return self._info(path).type == fs.FileType.File

    def size(self, path: str) -> int | None:
        """Size of a file in bytes, or None if it does not exist."""
        size: int | None = self._info(path).size
        return size

    def files(self, age: float = 0.0) -> dict[str, int]:
        """Name and size in bytes of the files directly in this folder; empty if the folder does not exist.

        Temporary files of local writers are left out.

        Args:
            age: least age of the files in seconds.
        """
        files = [info for info in self._list() if _is_file(info) and not _is_temporary(info)]
        latest = time.time() - age
        return {info.base_name: info.size for info in files if not age or info.mtime.timestamp() <= latest}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(info.base_name for info in self._list() if info.type == fs.FileType.Directory)

    def leftovers(self) -> dict[str, int]:
        """Name and size in bytes of the temporary files that killed writers left directly in this folder."""
        latest = time.time() - LEFTOVER_AGE_S
        old = (info for info in self._list() if _is_temporary(info) and info.mtime.timestamp() < latest)
        return {info.base_name: info.size for info in old if _is_file(info)}

    def delete(self, path: str) -> None:
        """Delete a file; a missing file is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._run("delete", path, lambda system, target: system.delete_file(target))

    def delete_folder(self) -> None:
        """Delete everything below `uri`; a missing folder is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._run("delete", "", _delete_folder)

    def _list(self) -> list[fs.FileInfo]:
        return self._run(
            "list", "", lambda system, root: system.get_file_info(fs.FileSelector(root, allow_not_found=True))
        )

    def _info(self, path: str) -> fs.FileInfo:
        return self._run("read", path, lambda system, target: system.get_file_info(target))

    def _run(self, doing: str, path: str, call: Callable[[fs.FileSystem, str], Result]) -> Result:
        """Call with the file system and the full path of a file or, for "", of this folder."""
        suffix = f"/{path}" if path else ""
        if self.is_local:
            try:
                return call(fs.LocalFileSystem(), self.uri + suffix)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise UserError(f"cannot {doing} {self.uri}{suffix}: {error.strerror or error}") from error

        def connected() -> Result:
            system, root = resolve(self.uri)
            return call(system, root + suffix)

        return attempt(doing, self.uri + suffix, connected)


@contextlib.contextmanager
def report_damage(uri: str) -> Iterator[None]:
    """Turn errors while parsing a file of the cache into one line that names the file and the remedy.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        reason = one_line(error)
        raise UserError(
            f"{uri} is damaged ({reason}): run jobs/precompute.py with this recipe and --verify --repair"
        ) from error


def _is_file(info: fs.FileInfo) -> bool:
    return bool(info.type == fs.FileType.File)


def _is_temporary(info: fs.FileInfo) -> bool:
    return _TEMPORARY.fullmatch(info.base_name) is not None


def _write_local(target: str, data: bytes | pa.Buffer) -> None:
    with atomic_write(Path(target)) as file:
        file.write(data)


def _upload(system: fs.FileSystem, target: str, data: bytes | pa.Buffer) -> None:
    # An object appears when its upload completes, so no rename is needed. All data goes in one write: closing or dropping
    # a stream completes the object with whatever was written until then.
    with system.open_output_stream(target) as stream:
        stream.write(data)


def _download(system: fs.FileSystem, target: str) -> bytes:
    with system.open_input_file(target) as file:
        size = file.size()
        data: bytes = file.read(size)  # without a size, pyarrow reads in requests of 256 KiB
    if len(data) != size:
        raise OSError(f"received {len(data)} of {size} bytes")
    return data


def _delete_folder(system: fs.FileSystem, root: str) -> None:
    # Keep the bucket itself, which we did not create either.
    delete = system.delete_dir if "/" in root.strip("/") else system.delete_dir_contents
    delete(root)
