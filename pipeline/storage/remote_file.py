"""A file by URI for random access, on what a driver can do."""

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipeline.storage.remote import StoreError, attempt, fsspec_driver, is_web, resolve

BLOCK = 4 << 20
"""Bytes of one request where a file is read from front to back."""


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
        driver = fsspec_driver(system)
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
            if self._file is None and self._streamed is None and self._open() != self.size:
                raise StoreError(f"{self.uri} has changed while it was read; run the same command again")
            if self._streamed is not None:
                return self._read_forward(start, size)
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
            self._file, self._streamed = fsspec_driver(system).open(path, "rb", block_size=0), 0
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
