"""Local copies of folders that lie in an object store."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.store import Store

_copies: list[tempfile.TemporaryDirectory[str]] = []
"""What was fetched, which goes when the process ends."""


def fetch(address: str) -> Path:
    """A local copy, as long as this process lasts, of the files of a folder in an object store, such as a run's `student`.

    Raises:
        UserError: where there are none, or the store cannot be used.
    """
    store = Store.at(address)
    names = store.files()
    if not names:
        raise UserError(f"{address}: there is no such folder, or it is empty")
    _copies.append(tempfile.TemporaryDirectory(prefix="regla-"))
    folder = Path(_copies[-1].name)
    for name in names:
        (folder / name).write_bytes(store.get(name))
    return folder
