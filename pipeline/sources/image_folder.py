"""Images in a folder: one folder per class, or all in one folder without labels."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.sources.base import IMAGE_EXTENSIONS, finish_index, foreign_name, oversize
from pipeline.sources.locations import readable_name, refuse_several_splits


@dataclass(frozen=True)
class ImageFolder:
    """`<location>/<class>/**/<image>`, labelled by sorted class folder, or `<location>/<image>` without labels.

    A sample id is the path below `location` with forward slashes. Hidden files and folders are ignored. An empty class
    folder keeps its label, so that the splits of a dataset agree.
    """

    random_access: ClassVar[bool] = True

    location: str
    classes: tuple[str, ...]

    @classmethod
    def open(cls, location: str) -> "ImageFolder":
        """Inspect the top level of an absolute folder path.

        Raises:
            UserError: if it cannot be listed, mixes images with class folders, or contains splits instead of classes.
        """
        entries = _entries(location)
        classes = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
        loose = next((entry.name for entry in entries if _is_image(entry)), None)
        if classes and loose:
            raise UserError(
                f"{location}: contains both images ({loose}) and class folders ({classes[0]}); "
                "move them into class folders, or into a folder of their own"
            )
        refuse_several_splits(location, classes)
        return cls(location, classes)

    @property
    def name(self) -> str:
        """The last two components of the folder's path."""
        return readable_name(self.location)

    def index(self) -> pa.Table:
        """One row per image file, with its size on disk."""
        labelled: list[tuple[os.DirEntry[str], int | None]]
        if self.classes:
            labelled = [
                (entry, label)
                for label, name in enumerate(self.classes)
                for entry in images_below(os.path.join(self.location, name))
            ]
        else:
            labelled = [(entry, None) for entry in _entries(self.location) if _is_image(entry)]
        paths = [_checked(entry.path) for entry, _ in labelled]
        start = len(self.location.rstrip(os.sep)) + 1
        table = pa.table(
            {
                "sample_id": pa.array([path[start:].replace(os.sep, "/") for path in paths], pa.string()),
                "label": pa.array([label for _, label in labelled], pa.int64()),
                "uri": pa.array(paths, pa.string()),
                "offset": pa.array([0] * len(paths), pa.int64()),
                "size": pa.array([_size(entry) for entry, _ in labelled], pa.int64()),
            }
        )
        looked_for = f"class folders or images ({', '.join(IMAGE_EXTENSIONS)}), .tar or .parquet files"
        return finish_index(table, location=self.location, looked_for=looked_for)

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """File contents of these index rows; an exception instead of a file that cannot be read or is too large."""
        for uri in rows["uri"].to_pylist():
            try:
                yield _read(Path(uri))
            except OSError as error:
                yield error


def _read(path: Path) -> bytes | Exception:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        return OSError(f"{path}: not a regular file")  # reading a pipe may block, reading a device may never end
    return oversize(info.st_size) or path.read_bytes()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check the path and its permissions") from error


def images_below(folder: str) -> Iterator[os.DirEntry[str]]:
    """The image files below a folder, in no particular order, without hidden files, hidden folders and linked folders.

    Raises:
        UserError: if a folder cannot be listed.
    """
    pending = [folder]
    while pending:
        for entry in _entries(pending.pop()):
            # A link to a folder may form a cycle. Links to files, and class folders that are links, are followed.
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif _is_image(entry):
                yield entry


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.is_dir()


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        # A broken link stays in the index: reading it fails for that sample alone.
        return 0


def _checked(path: str) -> str:
    if name := foreign_name(path):
        raise UserError(f"{name!r}: the file name is not valid UTF-8; rename the file")
    return path
