"""Named arrays as the bytes of an .npz file, and back; nothing is pickled."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np


def dump_arrays(arrays: Mapping[str, Any]) -> bytes:
    """The arrays (or numbers) as the bytes of an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def load_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of :func:`dump_arrays`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def kinds_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The token types of arrays that are named ``<token type>_<what>``, sorted."""
    return sorted({name.rsplit("_", 1)[0] for name in arrays})
