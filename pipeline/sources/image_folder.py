"""Images in a folder: one folder per class, or all in one folder without labels."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import INDEX_SCHEMA, ROWS_HELD, finish_index, oversize
from pipeline.sources.left_out import LeftOut, some
from pipeline.sources.listing import images_directly_in, images_in, top_level
from pipeline.sources.locations import readable_name, refuse_split_folders
from pipeline.storage.files import THREADS, read_bytes
from pipeline.storage.remote import is_uri

_LONGEST = 1 << 30
"""More bytes than a path has."""


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
        """Inspect the top level of a folder, by absolute path or URI.

        Raises:
            UserError: if it cannot be listed, mixes images with class folders, or contains splits instead of classes.
        """
        folders, images = top_level(location, LeftOut())
        classes = tuple(sorted(folders))
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

    def versions(self) -> dict[str, int]:
        """None: every image is a file of its own."""
        return {}

    def only(self, files: Sequence[str]) -> "ImageFolder":
        """This source, which has no such files."""
        return self

    def index(self) -> pa.Table:
        """One row per image file, with its size; the index's notes name what was left out."""
        left_out = LeftOut()
        start = len(os.fsencode(os.path.join(self.root, "")))
        if self.classes:
            below = images_in([os.path.join(self.root, name) for name in self.classes], left_out, self.root)
            table = _joined(_rows(files, label, start) for label, files in enumerate(below))
        else:
            table = _joined([_rows(images_directly_in(self.root, left_out), None, start)])
        found = {self.classes[label] for label in pc.unique(table["label"]).drop_null().to_pylist()}
        if empty := sorted({*self.classes} - found):
            left_out.notes.append(f"{len(empty)} classes without an image: {some(empty)}")
        looked_for = f"class folders or images ({', '.join(IMAGE_EXTENSIONS)}), .tar or .parquet files"
        return finish_index(table, location=self.location, looked_for=looked_for, left_out=left_out.all_notes())

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """File contents of these index rows; an exception instead of a file that cannot be read or is too large."""
        files = zip(rows["uri"].to_pylist(), rows["size"].to_pylist(), strict=True)
        if not is_uri(self.root):
            yield from (_read_local(path) for path, _ in files)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            yield from map_ahead(pool, _read_remote, files, THREADS)


def _rows(files: pa.Table, label: int | None, start: int) -> pa.Table:
    """The rows of files whose names begin at this byte of their paths."""
    names = pc.binary_slice(files["uri"].cast(pa.binary()), start, _LONGEST).cast(pa.string())
    if os.sep != "/":
        names = pc.replace_substring(names, os.sep, "/")
    labels, offsets = (pa.repeat(pa.scalar(value, pa.int64()), files.num_rows) for value in (label, 0))
    return pa.table([names, labels, files["uri"], offsets, files["size"], files["version"]], schema=INDEX_SCHEMA)


def _joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables as one, in pieces: the buffers of a table that was made of objects are up to twice as large as their content."""
    pieces, some, rows = [INDEX_SCHEMA.empty_table()], list[pa.Table](), 0
    for table in tables:
        some.append(table)
        rows += table.num_rows
        if rows >= ROWS_HELD:
            pieces.append(pa.concat_tables(some).combine_chunks())
            some, rows = [], 0
    return pa.concat_tables([*pieces, *some])


def _read_local(path: str) -> bytes | Exception:
    try:
        return oversize(os.path.getsize(path)) or read_bytes(path)
    except OSError as error:
        return error


def _read_remote(file: tuple[str, int]) -> bytes | Exception:
    uri, size = file
    try:
        return oversize(size) or read_bytes(uri)
    except FileNotFoundError as error:
        return error
