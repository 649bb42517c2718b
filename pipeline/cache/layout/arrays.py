"""Named arrays as the bytes of an .npz file, and back; nothing is pickled."""

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def dump_arrays(arrays: Mapping[str, Any]) -> bytes:
    """The arrays (or numbers) as the bytes of a compressed .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def load_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of :func:`dump_arrays`; ValueError or another of those that damaged files cause."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error


def kinds_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The token types of arrays that are named ``<token type>_<what>``, sorted."""
    return sorted({name.rsplit("_", 1)[0] for name in arrays})


def eight_bits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, D] and units [N] float32 whose products are the rows [N, D], within a 254th of a row's largest magnitude."""
    units = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
    return np.round(rows / np.where(units > 0, units, 1)[:, None]).astype(np.int8), units
