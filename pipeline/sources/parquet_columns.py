"""Find the column of a Parquet file that holds the images, and its layout."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError, one_line
from pipeline.imaging.decode import FORMATS
from pipeline.storage.remote import is_uri
from pipeline.storage.remote_file import parquet_file

Layout = Literal["struct", "encoded", "planes", "nested"]
"""`struct` {bytes, path} (Hugging Face), `encoded` bytes, `planes` flat (3, n, n) uint8, `nested` n x n x 3 lists."""

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "data", "pixels")


@dataclass(frozen=True)
class ImageColumn:
    """Name and layout of the column that holds the images."""

    name: str
    layout: Layout


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a Parquet file, by path or URI, and read its footer; UserError if it is missing, truncated or not Parquet."""
    with readable(path):
        return pq.ParquetFile(parquet_file(path) if is_uri(path) else path)


def read_batches(file: pq.ParquetFile, columns: list[str], batch_size: int = 65536) -> Iterator[pa.RecordBatch]:
    """All rows of some columns; reads one row group after the other, where `iter_batches` alone would fetch all ahead."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(batch_size, row_groups=[group], columns=columns)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Report errors of reading a Parquet file as a UserError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({one_line(error)}); fetch it again") from error


def find_image_column(path: str, file: pq.ParquetFile, named: str | None) -> ImageColumn:
    """The named column, or the only one that can hold images; of several, the one with a usual name.

    Raises:
        UserError: if no column or several columns fit, or the named one is missing or of another type.
    """
    schema = file.schema_arrow
    fitting = [field.name for field in schema if _layouts(field.type)]
    usual = [name for name in _IMAGE_NAMES if name in fitting]
    candidates = [named] if named else usual[:1] or fitting
    if len(candidates) != 1 or candidates[0] not in fitting:
        columns = ", ".join(f"{field.name}: {short_type(field.type)}" for field in schema)
        problem = f"column '{named}' holds no images" if named else "cannot tell which column holds the images"
        raise UserError(f"{path}: {problem}; set data.image_column to one of its columns ({columns})")
    name = candidates[0]
    layouts = _layouts(schema.field(name).type)
    with readable(path):
        return ImageColumn(name, layouts[0] if len(layouts) == 1 else _sniff(file, name))


def fits(column: ImageColumn, schema: pa.Schema) -> bool:
    """Whether a file of this schema holds images in this column in this layout."""
    return column.name in schema.names and column.layout in _layouts(schema.field(column.name).type)


def _layouts(kind: pa.DataType) -> tuple[Layout, ...]:
    if pa.types.is_struct(kind):
        inner = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return ("struct",) if inner is not None and _is_binary(_values(inner)) else ()
    if pa.types.is_fixed_size_binary(kind):
        return ("planes",) if is_square(kind.byte_width) else ()
    if _is_binary(_values(kind)):
        return ("encoded", "planes")
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth == 1 and kind == pa.uint8():
        return ("planes",)
    return ("nested",) if depth == 3 and pa.types.is_integer(kind) else ()


def is_square(count: int) -> bool:
    """Whether `count` values make three square planes."""
    return count > 0 and count == 3 * math.isqrt(count // 3) ** 2


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def image_values(column: pa.Array | pa.ChunkedArray, layout: Layout) -> pa.Array | pa.ChunkedArray:
    """The images themselves in a column, without the struct around them."""
    values = pc.struct_field(column, "bytes") if layout == "struct" else column
    # pyarrow can neither filter, take nor slice views.
    return values.cast(pa.large_binary()) if pa.types.is_binary_view(values.type) else values


def _sniff(file: pq.ParquetFile, name: str) -> Layout:
    """Tell encoded images from raw planes, which have no header, by the first stored value."""
    batch = next(read_batches(file, [name], 16), None)
    values = pc.drop_null(image_values(batch.column(0), "encoded")) if batch is not None else []
    if not len(values):
        return "encoded"
    try:
        Image.open(io.BytesIO(values[0].as_py()), formats=FORMATS)
    except UnidentifiedImageError:
        return "planes" if is_square(len(values[0].as_py())) else "encoded"
    except Image.DecompressionBombError:
        pass  # its header is an image's
    return "encoded"


def short_type(kind: pa.DataType) -> str:
    """A type for a message."""
    text = str(kind)
    return text if len(text) <= 40 else text[:37] + "..."
