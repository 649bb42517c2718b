"""The image files of folders, local or in a store, as tables: a million objects of Python take gigabytes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import ROWS_HELD, foreign_name
from pipeline.sources.left_out import LeftOut, is_system
from pipeline.storage.files import THREADS, Entry, list_folder, stat_local
from pipeline.storage.remote import is_uri

FILES_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("stamp", pa.int64(), nullable=False),
    ]
)
"""One row per file: its path or URI, its bytes, and its stamp; where it differs, the content may.

That is the modification time in nanoseconds of a local file (:func:`~pipeline.storage.files.stat_local`), of one in a store its
version (:class:`~pipeline.storage.files.Entry`).
"""
LOCAL_THREADS = 4
"""Local folders listed at the same time: a network's file system answers each question after a while."""


def top_level(folder: str, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """The names of the folders and of the image files directly in a folder, without those of the system.

    Raises:
        UserError: if it cannot be listed.
    """
    if not is_uri(folder):
        folders, images = _list(folder, left_out)
        return [entry.name for entry in folders], images
    entries = list_folder(folder)
    names = [os.path.basename(entry.path) for entry in entries if entry.is_folder]
    found = _images([entry for entry in entries if not entry.is_folder], folder, left_out)
    return [name for name in names if not is_system(name)], [os.path.basename(file.path) for file in found]


def images_directly_in(folder: str, left_out: LeftOut) -> pa.Table:
    """The image files in a folder itself (`FILES_SCHEMA`), sorted; raises as :func:`images_in`."""
    if is_uri(folder):
        files = [entry for entry in list_folder(folder) if not entry.is_folder]
        return _table(_rows(_images(files, folder, left_out)))
    return _described(folder, _list(folder, left_out)[1])


def images_in(folders: Sequence[str], left_out: LeftOut, root: str) -> Iterator[pa.Table]:
    """The image files below each of these folders (`FILES_SCHEMA`), without hidden files and those of the system.

    Those of one folder are sorted; otherwise the order is none in particular. Links to local folders elsewhere are followed, each
    folder once. Links into `root`, which contains the folders, or to a folder that contains it are not: their images are found
    anyway, or would be found forever. A store lists all files below a folder, with sizes and versions, in one go.

    Raises:
        UserError: if a folder cannot be listed, or the name of a file is not valid UTF-8.
    """
    local = not is_uri(root)
    list_images: Callable[[str], tuple[pa.Table, LeftOut]] = partial(_walk if local else _listed, root=root)
    threads = LOCAL_THREADS if local else THREADS
    with ThreadPoolExecutor(threads) as pool:
        for table, passed_over in map_ahead(pool, list_images, folders, threads):
            left_out.add(passed_over)
            yield table


def _listed(folder: str, root: str) -> tuple[pa.Table, LeftOut]:
    left_out = LeftOut()
    return _table(_rows(_images(list_folder(folder, recursive=True), root, left_out))), left_out


def _rows(files: Iterable[Entry]) -> Iterator[tuple[str, int, int]]:
    return ((file.path, file.size, file.version) for file in files)


def _images(files: Iterable[Entry], root: str, left_out: LeftOut) -> list[Entry]:
    """The images among the files of a store; others are counted."""
    images = []
    for file in files:
        *folders, name = file.path.removeprefix(f"{root}/").split("/")
        if is_system(name) or any(map(is_system, folders)):
            continue
        if name.lower().endswith(IMAGE_EXTENSIONS):
            images.append(file)
        else:
            left_out.count(name)
    return images


def _described(folder: str, names: Sequence[str]) -> pa.Table:
    """Rows of `FILES_SCHEMA` of local files; a broken link has no size, and reading it fails for that sample alone."""
    start, tables = os.path.join(folder, ""), [FILES_SCHEMA.empty_table()]
    for first in range(0, len(names), ROWS_HELD):
        paths = [start + name for name in names[first : first + ROWS_HELD]]
        try:
            tables.append(pa.table([paths, *stat_local(paths)], schema=FILES_SCHEMA))
        except UnicodeEncodeError:
            raise _foreign(paths) from None
    return pa.concat_tables(tables)


def _foreign(paths: Iterable[str]) -> UserError:
    name = next(filter(None, map(foreign_name, paths)))
    return UserError(f"{name!r}: the file name is not valid UTF-8; rename the file")


def _table(files: Iterable[tuple[str, int, int]]) -> pa.Table:
    """Rows of `FILES_SCHEMA` as a table."""
    left, tables = iter(files), [FILES_SCHEMA.empty_table()]
    while some := [*islice(left, ROWS_HELD)]:
        paths, sizes, versions = zip(*some, strict=True)
        try:
            tables.append(pa.table([paths, sizes, versions], schema=FILES_SCHEMA))
        except UnicodeEncodeError:
            raise _foreign(paths) from None
    return pa.concat_tables(tables)


def _walk(folder: str, root: str) -> tuple[pa.Table, LeftOut]:
    """As :func:`images_in`, for one local folder, and what was passed over."""
    root, left_out, tables = os.path.realpath(root), LeftOut(), []
    reached = {os.path.realpath(folder)}  # real paths of the folders outside the tree of `folder`
    folders = [(folder, os.path.islink(folder))]
    while folders:
        parent, outside = folders.pop()
        below, images = _list(parent, left_out)
        tables.append(_described(parent, images))
        for entry in sorted(below):  # for the digest of a folder that has not changed
            path, is_outside = os.path.join(parent, entry.name), outside or entry.is_link
            if is_outside:
                real = os.path.realpath(path)
                if real in reached or _contains(root, real) or _contains(real, root):
                    left_out.loops.append(os.path.relpath(path, root))
                    continue
                reached.add(real)
            folders.append((path, is_outside))
    return pa.concat_tables(tables), left_out


def _contains(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


class _Folder(NamedTuple):
    name: str
    is_link: bool


def _list(folder: str, left_out: LeftOut) -> tuple[list[_Folder], list[str]]:
    """The folders and the names of the image files directly in a folder, the names sorted; other files are counted.

    Raises:
        UserError: if it cannot be listed.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                # First what nearly all are: this runs a million times.
                if name.lower().endswith(IMAGE_EXTENSIONS) and not (name[0] == "." or entry.is_dir()):
                    images.append(name)
                elif is_system(name):
                    continue
                elif entry.is_dir():
                    folders.append(_Folder(name, entry.is_symlink()))
                else:
                    left_out.count(name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check the path and its permissions") from error
    return folders, sorted(images)
