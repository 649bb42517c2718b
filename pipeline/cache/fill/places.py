"""Where rows of an index lie in another table, by the places of their files: joined by hash, then compared, all in arrays."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.base import INDEX_SCHEMA

PLACE = ["uri", "offset", "size", "version"]
"""Columns that tell a file, and an image in it, from all others."""
ROWS_HASHED = 1 << 16
"""Rows that are hashed at a time."""
_WORD, _FACTOR, _SHIFT = 8, np.uint64(0x9E3779B97F4A7C15), np.uint64(29)
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(_WORD + 1)], np.uint64)
"""Of a word, the first bytes, by their number."""


class Places:
    """The places of an index, none of which occurs twice, in the order of their hashes: 16 bytes per row.

    Args:
        index: rows of `INDEX_SCHEMA`.
    """

    def __init__(self, index: pa.Table) -> None:
        self.index = index
        hashes = _hashes(index)
        self.order = np.argsort(hashes)
        self.hashes = hashes[self.order]

    def find(self, known: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the index at places of another table, and their rows there, int64, in the order of the latter."""
        if not len(self.hashes) or not known.num_rows:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        nearest = np.searchsorted(self.hashes, _hashes(known))
        at = self.order[np.minimum(nearest, len(self.hashes) - 1)]
        same = self.equal(at, known.select(PLACE))
        return at[same], np.flatnonzero(same)

    def rows(self, at: np.ndarray, columns: Sequence[str] = INDEX_SCHEMA.names) -> pa.Table:
        """These rows of the index. Those of a table in many pieces would be taken from a copy of it."""
        order = np.argsort(at)
        schema = pa.schema([self.index.schema.field(name) for name in columns])
        taken = pa.table([_taken(self.index[name], at[order]) for name in columns], schema=schema)
        return taken.take(pa.array(np.argsort(order)))

    def equal(self, at: np.ndarray, others: pa.Table) -> np.ndarray:
        """Which of these rows of the index, bool, have the values of the rows of a table, which has some of its columns."""
        mine, same = self.rows(at, others.column_names), np.ones(len(at), bool)
        for name in others.column_names:
            nulls = pc.is_null(mine[name]), pc.is_null(others[name])
            equal = pc.if_else(pc.or_(*nulls), pc.and_(*nulls), pc.equal(mine[name], others[name]))
            same &= equal.to_numpy()
        return same


def _taken(column: pa.ChunkedArray, at: np.ndarray) -> pa.ChunkedArray:
    """Values of a column by their numbers in ascending order."""
    first, taken = 0, []
    for chunk in column.chunks:
        start, end = np.searchsorted(at, [first, first + len(chunk)])
        taken.append(chunk.take(pa.array(at[start:end] - first)))
        first += len(chunk)
    return pa.chunked_array(taken, column.type).combine_chunks()


def _hashes(rows: pa.Table) -> np.ndarray:
    """64-bit hashes of file and offset, uint64."""
    hashes = [np.empty(0, np.uint64)]
    for batch in rows.select(["uri", "offset"]).to_batches(ROWS_HASHED):
        hashes.append(_mixed(string_hashes(batch["uri"]), batch["offset"].to_numpy().view(np.uint64)))
    return np.concatenate(hashes)


def string_hashes(strings: pa.Array) -> np.ndarray:
    """64-bit hashes of strings without nulls, uint64, the same in every array."""
    ends = np.frombuffer(strings.buffers()[1], np.int32)[strings.offset :][: len(strings) + 1].astype(np.int64)
    content = strings.buffers()[2]
    held = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]] if content else np.empty(0, np.uint8)
    data = np.concatenate([held, np.zeros(_WORD, np.uint8)])
    words = np.ndarray(len(data) - _WORD + 1, "<u8", data, 0, (1,))  # those that begin at every byte
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    hashes = lengths.astype(np.uint64)
    for first in range(0, int(lengths.max(initial=0)), _WORD):
        left = np.clip(lengths - first, 0, _WORD)
        word = words[np.minimum(starts + first, len(words) - 1)] & _MASKS[left]
        hashes = np.where(left > 0, _mixed(hashes, word), hashes)
    return hashes


def _mixed(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    product = (hashes ^ words) * _FACTOR
    mixed: np.ndarray = product ^ (product >> _SHIFT)
    return mixed
