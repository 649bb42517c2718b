"""Local copies of folders in an object store."""

import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.store import Store

_copies: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def temporary_folder(parent: Path | None = None) -> Path:
    """A new folder in `parent`, or in the system's temporary folder, that is removed when this process ends."""
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    _copies.append(tempfile.TemporaryDirectory(prefix="fetched-", dir=parent))
    return Path(_copies[-1].name)


def fetch(address: str, parent: Path | None = None) -> Path:
    """A copy of the files of a folder in an object store, such as a run's `student`, in a new :func:`temporary_folder`.

    Raises:
        UserError: if there are no files, or the store cannot be used.
    """
    store = Store.at(address)
    if not (names := store.files()):
        raise UserError(f"{address}: the folder does not exist or is empty")
    folder = temporary_folder(parent)
    for name in names:
        (folder / name).write_bytes(store.get(name))
    return folder
