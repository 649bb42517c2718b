"""Files that jobs read, by local path or by URI: what exists, what folders hold, and the bytes.

Failures of a store are retried (`pipeline.storage.remote.attempt`) and end as `StoreError`, a line with URI, reason and remedy.
Local files raise OSError as Python's own functions do.
"""

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.storage.remote import StoreError, attempt, is_uri, is_web, resolve

BLOCK = 4 << 20
"""Bytes of one request where a file by URI is read from front to back."""
HEADER = 1 << 16
"""The same for a file of which only the first bytes are needed."""
THREADS = 16
"""Requests at the same time, since each waits for the network."""

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
        with _missing(path):
            return attempt("read", path, lambda: _describe(path))
    info = os.stat(path)
    return Entry(path, stat.S_ISDIR(info.st_mode), info.st_size, _version(info.st_mtime_ns, info.st_size))


def exists(path: str) -> bool:
    """Whether there is a file or folder at a local path or URI; StoreError if the store fails."""
    try:
        return bool(describe(path)) if is_uri(path) else os.path.exists(path)
    except FileNotFoundError:
        return False


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


NO_LISTING = (
    "a web server has no folders that can be listed; copy the folder to s3://, gs://, az:// or hf://, or name .tar or .parquet "
    "files, several with braces (https://host/train-{000..127}.tar)"
)


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


@contextmanager
def _missing(uri: str) -> Iterator[None]:
    """Drivers' errors of a missing file as that of a local one."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error


class RemoteFile(io.RawIOBase):
    """A file by URI for random access. Every read asks for just these bytes, and goes on after a failure where it was.

    A server without range requests sends the file from its start whenever a read goes back, and never more than once as long
    as reads go forward.

    Attributes:
        size: in bytes.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri
        self._position = 0
        self._file: Any = None
        self._streamed: int | None = None
        """Position of a file that can only be read forward; None: any range can be asked for."""
        with _missing(uri):
            self.size: int = attempt("read", uri, self._open)

    @property
    def ranges(self) -> bool:
        """Whether the store answers range requests; asks for the last byte to find out."""
        if self.size and self._streamed is None:
            self.seek(self.size - 1)
            self.read(1)
        return self._streamed is None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file; nothing is read."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the file goes.

        Raises:
            StoreError: if the store fails or ends before the file does.
        """
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - self._position))
        done = 0
        while done < wanted:
            data = attempt("read", self.uri, lambda: self._read_some(self._position, wanted - done))  # noqa: B023
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def readall(self) -> bytes:
        """The rest of the file."""
        return self.read(max(0, self.size - self._position)) or b""

    def close(self) -> None:
        """Close the connection, if it has its own."""
        self._drop()
        super().close()

    def _open(self) -> int:
        system, path = resolve(self.uri)
        driver = _fsspec(system)
        if driver is None:
            self._file = system.open_input_file(path)
            return int(self._file.size())
        info = driver.info(path)
        if info.get("size") is None:
            raise StoreError(
                f"cannot read {self.uri}: the server does not tell the size of the file; copy it to another store"
            )
        if not info.get("partial", True):
            self._streamed = info["size"]  # opened at the first read
        elif info["size"]:
            self._file = driver.open(path, "rb", cache_type="none", size=info["size"])
        return int(info["size"])

    def _read_some(self, start: int, size: int) -> bytes:
        """At least one byte, at most `size`, from `start`."""
        try:
            if self._streamed is not None:
                return self._read_forward(start, size)
            if self._file is None:
                self._open()
            self._file.seek(start)
            return _some(self._file.read(size), start, self.size)[:size]
        except ValueError:
            if self._streamed is not None or not is_web(self.uri):
                raise
            self._drop()  # the server has ignored the range
            self._streamed = self.size
            return self._read_forward(start, size)
        except Exception:
            self._drop()
            raise

    def _read_forward(self, start: int, size: int) -> bytes:
        assert self._streamed is not None
        if self._file is None or self._streamed > start:
            self._drop()
            system, path = resolve(self.uri)
            self._file, self._streamed = _fsspec(system).open(path, "rb", block_size=0), 0
        while True:
            data = _some(self._file.read(min(BLOCK, max(start - self._streamed, size))), self._streamed, self.size)
            skipped = start - self._streamed
            self._streamed += len(data)
            if len(data) > skipped:
                return data[skipped : skipped + size]

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _some(data: bytes, start: int, size: int) -> bytes:
    if not data:
        raise OSError(f"the answer ends at byte {start} of {size}")
    return data


def parquet_file(uri: str) -> pa.NativeFile:
    """A file by URI for pyarrow, which reads it in ranges.

    Raises:
        FileNotFoundError: if it does not exist.
        StoreError: if the store fails, or does not answer range requests.
    """
    file = RemoteFile(uri)
    if not file.ranges:
        file.close()
        raise StoreError(
            f"cannot read {uri}: the server does not answer range requests, by which Parquet is read; "
            "name .tar files, or copy it to another store or a local folder"
        )
    return pa.PythonFile(file, mode="r")


def read_extents(path: str, extents: Iterable[tuple[int, int]], *, gap: int = 1 << 16) -> Iterator[bytes]:
    """(offset, size) of a file by URI in ascending order: its bytes, fewer where the file ends before.

    Extents with at most `gap` bytes between them share a request of at most `BLOCK` bytes.
    """
    with RemoteFile(path) as file:
        for run in _runs(extents, gap):
            start, end = run[0][0], max(map(sum, run))
            file.seek(start)
            data = file.read(max(0, min(end, file.size) - start)) or b""
            yield from (data[offset - start : offset - start + size] for offset, size in run)


def _runs(extents: Iterable[tuple[int, int]], gap: int) -> Iterator[list[tuple[int, int]]]:
    run: list[tuple[int, int]] = []
    for offset, size in extents:
        if run and (offset - sum(run[-1]) > gap or offset + size - run[0][0] > BLOCK):
            yield run
            run = []
        run.append((offset, size))
    if run:
        yield run


def _describe(uri: str) -> Entry:
    system, path = resolve(uri)
    driver = _fsspec(system)
    if driver is not None:
        return _entry(uri, driver.info(path))
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return _arrow_entry(uri, info)


def _list(uri: str, recursive: bool) -> Iterator[Entry]:
    system, root = resolve(uri)
    driver = _fsspec(system)
    if driver is None:
        for info in system.get_file_info(fs.FileSelector(root, recursive=recursive)):
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


def _fsspec(system: fs.FileSystem) -> Any:
    """The driver of fsspec below a file system of pyarrow, or None."""
    return system.handler.fs if isinstance(system, fs.PyFileSystem) else None


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
    text = f"{tag} {size}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
