"""A folder, local or in an object store, in which a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError


@dataclass(frozen=True)
class Store:
    """Reads and atomically writes the files below `uri`. Picklable: it travels to Ray workers.

    Attributes:
        uri: an absolute local path, or any URI that pyarrow's file systems know (``s3://...``, ``gs://...``).
    """

    uri: str

    @classmethod
    def at(cls, location: str | Path) -> Store:
        """The store at a local path (made absolute) or a URI."""
        text = str(location)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve()))

    def sub(self, folder: str) -> Store:
        """The store of a folder below this one."""
        return Store(f"{self.uri}/{folder}")

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's file system."""
        return "://" not in self.uri

    def _resolve(self, path: str = "") -> tuple[fs.FileSystem, str]:
        filesystem, root = (fs.LocalFileSystem(), self.uri) if self.is_local else fs.FileSystem.from_uri(self.uri)
        return filesystem, f"{root}/{path}" if path else root

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file so that a reader sees all of it or none of it, even after a crash or a power cut.

        Raises:
            UserError: where the destination is full, read-only or otherwise refuses the write.
        """
        try:
            self._put_local(Path(self.uri, path), data) if self.is_local else self._put_remote(path, data)
        except OSError as error:
            raise UserError(f"cannot write {self.uri}/{path}: {error.strerror or error}") from error

    def _put_local(self, target: Path, data: bytes | pa.Buffer) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _put_remote(self, path: str, data: bytes | pa.Buffer) -> None:
        # An object appears when its upload completes, so there is nothing to rename.
        filesystem, target = self._resolve(path)
        with filesystem.open_output_stream(target) as stream:
            stream.write(data)

    def get(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: where there is none.
        """
        filesystem, target = self._resolve(path)
        with filesystem.open_input_stream(target) as stream:
            return stream.read()

    def open(self, path: str) -> pa.NativeFile:
        """A file for random access; local files are memory-mapped."""
        if self.is_local:
            return pa.memory_map(f"{self.uri}/{path}")
        filesystem, target = self._resolve(path)
        return filesystem.open_input_file(target)

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        filesystem, target = self._resolve(path)
        return filesystem.get_file_info(target).type == fs.FileType.File

    def size(self, path: str) -> int | None:
        """Size of a file in bytes, or None where there is none."""
        filesystem, target = self._resolve(path)
        size: int | None = filesystem.get_file_info(target).size
        return size

    def files(self) -> dict[str, int]:
        """Name and size in bytes of the files directly in this folder; empty where there is no folder."""
        return {info.base_name: info.size for info in self._list() if info.type == fs.FileType.File}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(info.base_name for info in self._list() if info.type == fs.FileType.Directory)

    def _list(self) -> list[fs.FileInfo]:
        filesystem, root = self._resolve()
        return filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
