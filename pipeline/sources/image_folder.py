"""Images in a folder: one folder per class, or all in one folder without labels."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import INDEX_SCHEMA, ROWS_HELD, finish_index, oversize
from pipeline.sources.left_out import LeftOut, some
from pipeline.sources.listed import Files, Listed
from pipeline.sources.listing import images_directly_in, images_in, top_level
from pipeline.sources.locations import readable_name, refuse_split_folders
from pipeline.storage.files import THREADS, local_versions, read_bytes
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

    def listed(self) -> Listed:
        """The image files as they are now."""
        left_out, files = LeftOut(), Files()
        if self.classes:
            folders = [os.path.join(self.root, name) for name in self.classes]
            counts = [files.add(found) for found in images_in(folders, left_out, self.root)]
        else:
            counts = [files.add(images_directly_in(self.root, left_out))]
        if empty := [name for name, count in zip(self.classes, counts, strict=False) if not count]:
            left_out.notes.append(f"{len(empty)} classes without an image: {some(empty)}")
        notes, found = tuple(left_out.all_notes()), files.table()
        return Listed(files.digest(self.root, self.classes, counts), notes, lambda: self._index(found, counts, notes))

    def index(self) -> pa.Table:
        """One row per image file, with its size; the index's notes name what was left out."""
        return self.listed().index()

    def _index(self, files: pa.Table, counts: Sequence[int], left_out: Sequence[str]) -> pa.Table:
        """The index of files, so many of each class."""
        start, tables, first = len(os.fsencode(os.path.join(self.root, ""))), [INDEX_SCHEMA.empty_table()], 0
        labels = np.repeat(np.arange(len(counts)) if self.classes else -1, counts)  # -1: none
        for batch in files.to_batches(ROWS_HELD):
            names = pc.binary_slice(batch["uri"].cast(pa.binary()), start, _LONGEST).cast(pa.string())
            if os.sep != "/":
                names = pc.replace_substring(names, os.sep, "/")
            sizes, versions = batch["size"].to_numpy(), batch["stamp"].to_numpy()
            if not is_uri(self.root):
                versions = local_versions(sizes, versions)
            of_class, zeros = labels[first : first + len(batch)], np.zeros(len(batch), np.int64)
            tables.append(pa.table([names, of_class, batch["uri"], zeros, sizes, versions], schema=INDEX_SCHEMA))
            first += len(batch)
        looked_for = f"class folders or images ({', '.join(IMAGE_EXTENSIONS)}), .tar or .parquet files"
        return finish_index(pa.concat_tables(tables), location=self.location, looked_for=looked_for, left_out=left_out)

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """File contents of these index rows; an exception instead of a file that cannot be read or is too large."""
        files = zip(rows["uri"].to_pylist(), rows["size"].to_pylist(), strict=True)
        if not is_uri(self.root):
            yield from (_read_local(path) for path, _ in files)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            yield from map_ahead(pool, _read_remote, files, THREADS)


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
