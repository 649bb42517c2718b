"""A folder, local or in an object store, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
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
from pipeline.storage.remote import RetriedFile, attempt, check_address, list_infos, resolve

LEFTOVER_AGE_S = 3600.0
"""Age in seconds at which a temporary file counts as left by a killed writer."""
DELETIONS = 5
"""How often the deletion of a local folder is tried, into which another process writes meanwhile."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Store:
    """Reads and atomically writes the files below `uri`. Picklable.

    Operations on object stores are retried if the failure may be temporary (`pipeline.storage.remote.attempt`). Every
    operation raises UserError if the store is unreachable or refuses it; `get` and `open` raise FileNotFoundError for a
    missing file.

    Attributes:
        uri: an absolute local path, ``s3://bucket/folder``, ``gs://bucket/folder``, or the URI of another store that fsspec
            supports. It is taken literally: nothing in it is percent-encoded.
    """

    uri: str

    @classmethod
    def at(cls, location: str | Path) -> Store:
        """The store at a local path (made absolute) or a URI; UserError if the URI contains credentials or options."""
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
        """Raise UserError if the driver, the endpoint, the bucket or the permission to list it is missing."""
        if self._list() or not self.uri.startswith("s3://"):
            return
        bucket = "/".join(self.uri.split("/")[:3])
        if Store(bucket)._info("").type == fs.FileType.NotFound:
            raise UserError(f"{bucket} does not exist: create the bucket, or correct its name")

    def check_writable(self) -> None:
        """Raise UserError if files cannot be written and deleted here; creates a missing local folder."""
        self.check()
        try:
            self.put("write-trial", b"")
            self.delete("write-trial")
        except UserError as error:
            raise UserError(f"{error}; name a writable location") from error

    def free_bytes(self) -> int | None:
        """Free space in bytes at a local folder, which need not exist; None for object stores."""
        if not self.is_local:
            return None
        folder = Path(self.uri)
        return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file so that readers see all of it or none, even after a crash or a power cut."""

        def write(system: fs.FileSystem, target: str) -> None:
            # An object appears when its upload completes, so no rename is needed. All data goes in one write: closing or
            # dropping a stream completes the object with whatever was written until then.
            with atomic_write(Path(target)) if self.is_local else system.open_output_stream(target) as file:
                file.write(data)

        try:
            self._run("write", path, write)
        except FileNotFoundError as error:
            raise UserError(f"cannot write {self.uri}/{path}: no such bucket or folder") from error

    def get(self, path: str) -> bytes:
        """The bytes of a file."""
        return self._run("read", path, _download)

    def open(self, path: str) -> pa.NativeFile:
        """A file for random access."""
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
        return self._info(path).size

    def files(self, age: float = 0.0) -> dict[str, int]:
        """Name and size in bytes of the files directly in this folder that are at least `age` seconds old.

        Temporary files of local writers are left out. A missing folder has no files.
        """
        return self._sizes(age, temporary=False)

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(info.base_name for info in self._list() if info.type == fs.FileType.Directory)

    def bytes_below(self) -> int:
        """Bytes of all files in this folder and below."""
        return sum(self.files().values()) + sum(self.sub(name).bytes_below() for name in self.folders())

    def leftovers(self) -> dict[str, int]:
        """Name and size in bytes of the temporary files that killed writers left directly in this folder."""
        return self._sizes(LEFTOVER_AGE_S, temporary=True)

    def _sizes(self, age: float, temporary: bool) -> dict[str, int]:
        latest, sizes = time.time() - age, {}
        for info in self._list():  # a plan lists ten thousands of folders
            name = info.base_name
            if (
                name.startswith(".") and bool(_TEMPORARY.fullmatch(name))
            ) != temporary or info.type != fs.FileType.File:
                continue
            # A file whose age is not known counts as new.
            if not age or (info.mtime is not None and info.mtime.timestamp() <= latest):
                sizes[name] = info.size
        return sizes

    def delete(self, path: str) -> None:
        """Delete a file; a missing file is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._run("delete", path, lambda system, target: system.delete_file(target))

    def delete_folder(self) -> None:
        """Delete everything below `uri`; a missing folder is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._run("delete", "", _delete_folder)

    def _list(self) -> list[fs.FileInfo]:
        return self._run("list", "", lambda system, root: list_infos(system, root, missing=True))

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


class DamagedError(UserError):
    """A file is missing, or its content is not what it should be."""


@contextlib.contextmanager
def report_damage(uri: str) -> Iterator[None]:
    """Turn errors of reading or parsing a file of the cache into a DamagedError of one line that names file and remedy."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(
            f"{uri} is damaged ({one_line(error)}): run jobs/precompute.py with this recipe and --verify --repair"
        ) from error


def _download(system: fs.FileSystem, target: str) -> bytes:
    with system.open_input_file(target) as file:
        size = file.size()
        data = file.read(size)  # without a size, pyarrow reads in requests of 256 KiB
    if len(data) != size:
        raise OSError(f"received {len(data)} of {size} bytes")
    return data


def _delete_folder(system: fs.FileSystem, root: str) -> None:
    # Keep the bucket itself, which we did not create either.
    delete = system.delete_dir if "/" in root.strip("/") else system.delete_dir_contents
    for left in reversed(range(DELETIONS)):
        try:
            delete(root)
            break
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise
