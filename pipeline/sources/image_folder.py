"""Images in a folder: one folder per class, or all in one folder without labels."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.sources.base import IMAGE_EXTENSIONS, IndexRow, foreign_name, make_index, oversize
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
        _, folders, images = next(_walk(location))
        classes = tuple(sorted(folders))
        if classes and images:
            raise UserError(
                f"{location}: contains both images ({images[0]}) and class folders ({classes[0]}); "
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
        rows = [
            self._row(path, label)
            for label, name in enumerate(self.classes)
            for path in images_below(os.path.join(self.location, name))
        ]
        if not self.classes:
            folder, _, names = next(_walk(self.location))
            rows = [self._row(os.path.join(folder, name), None) for name in names]
        looked_for = f"class folders or images ({', '.join(IMAGE_EXTENSIONS)}), .tar or .parquet files"
        return make_index(rows, location=self.location, looked_for=looked_for)

    def _row(self, path: str, label: int | None) -> IndexRow:
        if name := foreign_name(path):
            raise UserError(f"{name!r}: the file name is not valid UTF-8; rename the file")
        try:
            size = os.path.getsize(path)
        except OSError:  # a broken link stays in the index: reading it fails for that sample alone
            size = 0
        sample_id = path.removeprefix(os.path.join(self.location, "")).replace(os.sep, "/")
        return IndexRow(sample_id, label, path, 0, size)

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """File contents of these index rows; an exception instead of a file that cannot be read or is too large."""
        for uri in rows["uri"].to_pylist():
            try:
                info = os.stat(uri)
                if not stat.S_ISREG(info.st_mode):  # reading a pipe may block, reading a device may never end
                    raise OSError(f"{uri}: not a regular file")
                content: bytes | Exception = oversize(info.st_size) or Path(uri).read_bytes()
            except OSError as error:
                content = error
            yield content


def images_below(folder: str) -> Iterator[str]:
    """Image files below a folder, unsorted, without hidden entries and linked folders; UserError if that fails."""
    return (os.path.join(parent, name) for parent, _, names in _walk(folder) for name in names)


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` of a folder without hidden entries, with the names of image files only.

    Links to folders are not followed, as they may form a cycle; `folder` itself may be a link.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_unlistable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
        yield parent, folders, images


def _refuse_unlistable(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: cannot be listed ({error.strerror}); check the path and its permissions"
    ) from error
