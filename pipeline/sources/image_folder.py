"""Images in a folder: one folder per class, or all in one folder without labels."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.sources.base import IndexRow, file_version, foreign_name, make_index, oversize
from pipeline.sources.left_out import LeftOut, is_system, some
from pipeline.sources.locations import readable_name, refuse_split_folders


@dataclass(frozen=True)
class ImageFolder:
    """`<root>/<class>/**/<image>`, labelled by sorted class folder, or `<root>/<image>` without labels.

    A sample id is the path below `root` with forward slashes. Hidden files, and what systems leave in folders, are ignored. An
    empty class folder keeps its label, so that the splits of a dataset agree.

    Attributes:
        location: as given: `root`, or a pattern of class folders in it.
    """

    random_access: ClassVar[bool] = True

    location: str
    root: str
    classes: tuple[str, ...]

    @classmethod
    def open(cls, location: str) -> "ImageFolder":
        """Inspect the top level of an absolute folder path.

        Raises:
            UserError: if it cannot be listed, mixes images with class folders, or contains splits instead of classes.
        """
        folders, images = _list(location, LeftOut())
        classes = tuple(sorted(entry.name for entry in folders))
        if classes and images:
            raise UserError(
                f"{location}: contains both images ({images[0]}) and class folders ({classes[0]}); "
                "move them into class folders, or into a folder of their own"
            )
        refuse_split_folders(location, classes)
        return cls(location, location, classes)

    @classmethod
    def of_classes(cls, location: str, folders: Sequence[str]) -> "ImageFolder":
        """The class folders that a pattern matches, whatever their names.

        Raises:
            UserError: if they are not in one folder.
        """
        roots = sorted({os.path.dirname(folder) for folder in folders})
        if len(roots) > 1:
            raise UserError(f"{location}: class folders must be in one folder, but these are in {some(roots)}")
        return cls(location, roots[0], tuple(sorted(map(os.path.basename, folders))))

    @property
    def name(self) -> str:
        """The last two components of the location."""
        return readable_name(self.location)

    def index(self) -> pa.Table:
        """One row per image file, with its size on disk; the index's notes name what was left out."""
        left_out = LeftOut()
        rows = [
            self._row(path, label)
            for label, name in enumerate(self.classes)
            for path in images_below(os.path.join(self.root, name), left_out, self.root)
        ]
        if not self.classes:
            rows = [self._row(os.path.join(self.root, name), None) for name in _list(self.root, left_out)[1]]
        if empty := sorted({*self.classes} - {self.classes[row.label] for row in rows if row.label is not None}):
            left_out.notes.append(f"{len(empty)} classes without an image: {some(empty)}")
        looked_for = f"class folders or images ({', '.join(IMAGE_EXTENSIONS)}), .tar or .parquet files"
        return make_index(rows, location=self.location, looked_for=looked_for, left_out=left_out.all_notes())

    def _row(self, path: str, label: int | None) -> IndexRow:
        if name := foreign_name(path):
            raise UserError(f"{name!r}: the file name is not valid UTF-8; rename the file")
        try:
            info = os.stat(path)
        except OSError:  # a broken link stays in the index: reading it fails for that sample alone
            size = version = 0
        else:
            size, version = info.st_size, file_version(info)
        sample_id = path.removeprefix(os.path.join(self.root, "")).replace(os.sep, "/")
        return IndexRow(sample_id, label, path, 0, size, version)

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


def images_below(folder: str, left_out: LeftOut, root: str | None = None) -> Iterator[str]:
    """Paths of the image files below a folder, in no particular order, without hidden files and those of the system.

    Links to folders elsewhere are followed, each folder once. Links into `root` (None: `folder`) or to a folder that contains
    it are not: their images are found anyway, or would be found forever.

    Raises:
        UserError: if a folder cannot be listed.
    """
    root = os.path.realpath(root or folder)
    reached = {os.path.realpath(folder)}  # real paths of the folders outside the tree of `folder`
    folders = [(folder, os.path.islink(folder))]
    while folders:
        parent, outside = folders.pop()
        below, images = _list(parent, left_out)
        yield from (os.path.join(parent, name) for name in images)
        for entry in below:
            path, is_outside = os.path.join(parent, entry.name), outside or entry.is_link
            if is_outside:
                real = os.path.realpath(path)
                if real in reached or _contains(root, real) or _contains(real, root):
                    left_out.loops.append(os.path.relpath(path, root))
                    continue
                reached.add(real)
            folders.append((path, is_outside))


def _contains(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


class _Folder(NamedTuple):
    name: str
    is_link: bool


def _list(folder: str, left_out: LeftOut) -> tuple[list[_Folder], list[str]]:
    """The folders and the names of the image files directly in a folder; other files are counted.

    Raises:
        UserError: if it cannot be listed.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(_Folder(entry.name, entry.is_symlink()))
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                    images.append(entry.name)
                else:
                    left_out.count(entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check the path and its permissions") from error
    return folders, images
