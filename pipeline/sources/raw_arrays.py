"""Images stored as raw uint8 arrays in Parquet columns: their sizes, and their pixels as lossless PNG."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.sources.parquet_columns import Layout, is_square


def byte_counts(column: pa.Array, layout: Layout) -> pa.Array:
    """Bytes of each image as int64, without decoding: the encoded length, 3 n² for arrays, 0 for null."""
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        counts = pc.if_else(column.is_valid(), kind.byte_width, 0)
    elif layout in ("struct", "encoded") or not pa.types.is_nested(kind):
        counts = pc.binary_length(column)
    else:
        counts = pc.list_value_length(column).cast(pa.int64())
        counts = pc.multiply(3, pc.multiply(counts, counts)) if layout == "nested" else counts
    return pc.fill_null(counts.cast(pa.int64()), 0)


def to_png(value: pa.Scalar, layout: Layout) -> bytes:
    """Encode a stored array, planes (3, n, n) or nested n x n x 3, as PNG.

    Raises:
        ValueError: if the array is not square with three channels, or a value is not in 0..255.
    """
    pixels = _nested_pixels(value) if layout == "nested" else _plane_pixels(value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _plane_pixels(value: pa.Scalar) -> np.ndarray:
    flat = value.values.to_numpy() if pa.types.is_nested(value.type) else np.frombuffer(value.as_buffer(), np.uint8)
    if not is_square(len(flat)):
        raise ValueError(f"{len(flat)} values do not make three square planes")
    side = math.isqrt(len(flat) // 3)
    return np.ascontiguousarray(flat.reshape(3, side, side).transpose(1, 2, 0))


def _nested_pixels(value: pa.Scalar) -> np.ndarray:
    rows = value.values
    columns = rows.flatten()
    side = len(rows)
    widths, channels = (pc.unique(pc.list_value_length(part)).to_pylist() for part in (rows, columns))
    if side == 0 or widths != [side] or channels != [3]:
        raise ValueError(f"nested lists of lengths {side}, {widths}, {channels} are not n x n x 3")
    return columns.flatten().cast(pa.uint8()).to_numpy().reshape(side, side, 3)
