"""Which images a teacher with a share is asked about, and how its shards leave out the others.

The choice depends on the key of the image alone: it stays when a data set grows, is the same in every split, and a larger share
contains every smaller one. Shards keep their rows, in which images without features are nulls: they align with those of other
teachers as always.
"""

import numpy as np
import pyarrow as pa

from pipeline.cache.layout.shards import fixed_width, in_one_piece

PRESENT = "present"
"""Beside the kinds of features in a batch, for a teacher with a share: [B] uint8, 1 for rows that have features."""

NONE_ASKED = "none of the images is in its share of {share:g}: raise the share, or add images"
"""What is wrong if a teacher has no features at all."""


def in_share(keys: pa.ChunkedArray, share: float) -> np.ndarray:
    """[N] bool: the images that a teacher with this share (below 1) is asked about.

    Compares the last half of the keys: their order, and so the place of an image in its part, follows the first.
    """
    numbers = np.ascontiguousarray(fixed_width(keys)[:, 8:]).view("<u8").reshape(-1)
    chosen: np.ndarray = numbers < np.uint64(round(share * 2**64))
    return chosen


def with_features(column: pa.ChunkedArray) -> np.ndarray:
    """[N] bool: the rows of a column of features that hold some."""
    present: np.ndarray = in_one_piece(column).is_valid().to_numpy(zero_copy_only=False)
    return present


def spread(rows: np.ndarray, chosen: np.ndarray) -> pa.FixedSizeBinaryArray:
    """A column whose `chosen` rows [N] bool are `rows` [M, width] uint8, in order, and whose others are null."""
    whole = np.zeros((len(chosen), rows.shape[1]), np.uint8)
    whole[chosen] = rows
    valid = pa.py_buffer(np.packbits(chosen, bitorder="little"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(chosen), [valid, pa.py_buffer(whole)])
