"""The files of a folder as they are now: a digest tells whether anything has changed, before an index is made of them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.sources.base import ROWS_HELD
from pipeline.sources.listing import FILES_SCHEMA


@dataclass(frozen=True)
class Listed:
    """What a source of single files lists.

    Attributes:
        digest: of root, classes, and path, size and stamp of every file, 128 bits in hexadecimal digits, and what else
            decides the index. Where it is that of another listing, both have the same index.
        notes: what was passed over, in phrases.
        index: makes the index; raises as :meth:`~pipeline.sources.base.Source.index`.
    """

    digest: str
    notes: tuple[str, ...]
    index: Callable[[], pa.Table]


class Files:
    """Tables of files (`FILES_SCHEMA`) in the order in which they are added, as one, with their digest."""

    def __init__(self) -> None:
        self._whole, self._new, self._rows = [FILES_SCHEMA.empty_table()], list[pa.Table](), 0
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, files: pa.Table) -> int:
        """Add a table; returns its number of rows."""
        for batch in files.to_batches():
            for column in _columns(batch):
                self._state.update(column)
        self._new.append(files)
        self._rows += files.num_rows
        if self._rows >= ROWS_HELD:
            # The buffers of a table that was made of objects are up to twice as large as their content.
            self._whole.append(pa.concat_tables(self._new).combine_chunks())
            self._new, self._rows = [], 0
        return int(files.num_rows)

    def table(self) -> pa.Table:
        """All files."""
        return pa.concat_tables([*self._whole, *self._new])

    def digest(self, root: str, classes: Sequence[str], counts: Sequence[int]) -> str:
        """Digest of all files with their root and classes, so many of each class."""
        state = self._state.copy()
        state.update(json.dumps([root, classes, counts]).encode())
        return state.hexdigest()


def _columns(files: pa.RecordBatch) -> Iterator[memoryview]:
    """The content of files, whole columns at a time."""
    uris = files["uri"]
    ends = np.frombuffer(uris.buffers()[1], np.int32)[uris.offset :][: len(uris) + 1]
    yield np.diff(ends).data
    yield memoryview(uris.buffers()[2])[ends[0] : ends[-1]]
    yield from (files[name].to_numpy().data for name in ("size", "stamp"))
