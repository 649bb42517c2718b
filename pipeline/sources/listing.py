"""The image files of folders, local or in a store."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.left_out import LeftOut, is_system
from pipeline.storage.files import THREADS, Entry, describe, list_folder
from pipeline.storage.remote import is_uri


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


def images_directly_in(folder: str, left_out: LeftOut) -> list[Entry]:
    """The image files in a folder itself; raises as :func:`top_level`."""
    if is_uri(folder):
        return _images([entry for entry in list_folder(folder) if not entry.is_folder], folder, left_out)
    return [_described(os.path.join(folder, name)) for name in _list(folder, left_out)[1]]


def images_in(folders: Sequence[str], left_out: LeftOut, root: str) -> Iterator[list[Entry]]:
    """The image files below each of these folders, in no particular order, without hidden files and those of the system.

    Links to local folders elsewhere are followed, each folder once. Links into `root`, which contains the folders, or to a
    folder that contains it are not: their images are found anyway, or would be found forever. A store lists all files below a
    folder, with sizes and versions, in one go.

    Raises:
        UserError: if a folder cannot be listed.
    """
    if not is_uri(root):
        yield from ([*map(_described, _walk(folder, left_out, root))] for folder in folders)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for entries in map_ahead(pool, partial(list_folder, recursive=True), folders, THREADS):
            yield _images(entries, root, left_out)


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


def _described(path: str) -> Entry:
    """A local file; a broken link has no size, and reading it fails for that sample alone."""
    try:
        return describe(path)
    except OSError:
        return Entry(path, False, 0, 0)


def _walk(folder: str, left_out: LeftOut, root: str) -> Iterator[str]:
    """The paths of :func:`images_in` below a local folder."""
    root = os.path.realpath(root)
    reached = {os.path.realpath(folder)}  # real paths of the folders outside the tree of `folder`
    folders = [(folder, os.path.islink(folder))]
    while folders:
        parent, outside = folders.pop()
        below, images = _list(parent, left_out)
        start = os.path.join(parent, "")
        yield from (start + name for name in images)
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
