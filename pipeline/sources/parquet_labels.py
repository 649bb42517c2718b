"""Labels in a Parquet column: numbers, booleans, or the names of classes."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources.parquet_columns import open_parquet, read_batches, readable, short_type

LABEL_NAMES = ("label", "fine_label", "labels")
"""Columns that hold labels if none is named."""


def label_kind(kind: pa.DataType) -> str:
    """``number``, ``boolean``, ``text``, or "" for a type that holds no labels; that of its values for a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else ""


def find_label_column(path: str, schema: pa.Schema, named: str | None) -> str | None:
    """The named column, or the first one with a usual name, or None; a usual name whose column holds none is passed over.

    Raises:
        UserError: if the named column is missing or of a type that holds no labels.
    """
    fitting = [field.name for field in schema if label_kind(field.type)]
    if named and named not in fitting:
        found = (
            f"column '{named}' holds {short_type(schema.field(named).type)}" if named in schema.names else "no column"
        )
        found += f" '{named}'" * (named not in schema.names)
        remedy = f"to one of: {', '.join(fitting)}" if fitting else "to null: the file has no labels"
        raise UserError(f"{path}: {found}, not class numbers or names; set data.label_column {remedy}")
    return named or next((name for name in LABEL_NAMES if name in fitting), None)


def unusable_labels(schema: pa.Schema, label_column: str | None) -> list[str]:
    """A note on the columns with a usual name whose types hold no labels, if no column has been found."""
    odd = [f"{name}: {short_type(schema.field(name).type)}" for name in LABEL_NAMES if name in schema.names]
    return [f"columns that hold no class numbers or names: {', '.join(odd)}"] if odd and not label_column else []


def class_names(files: Sequence[str], schema: pa.Schema, label_column: str | None) -> tuple[str, ...]:
    """Class names by label; empty if labels are numbers without names. `schema` is that of the first file.

    They are those of a Hugging Face `ClassLabel` in the schema's metadata, `false` and `true` for booleans, and for text
    its distinct values over all files, sorted, unless all of them are whole numbers.

    Raises:
        UserError: if a file cannot be read.
    """
    if label_column is None:
        return ()
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    kind = label_kind(schema.field(label_column).type)
    if kind == "boolean":
        return "false", "true"
    if kind != "text":
        return ()
    found: set[str] = set()
    for path in files:
        with open_parquet(path) as file, readable(path):
            if label_column in file.schema_arrow.names:  # the index refuses the file otherwise
                for batch in read_batches(file, [label_column]):
                    found.update(_names(batch.column(0)).drop_null().unique().to_pylist())
    return () if all(map(_is_whole, found)) else tuple(sorted(found))


def label_numbers(column: pa.Array, classes: Sequence[str]) -> pa.Array:
    """Labels as int64, null for none: numbers as they are, names by their place in `classes`.

    NaN and empty text are no label.

    Raises:
        ValueError: for a number that is not whole or beyond 64 bits, or a name that is no class; a short reason.
    """
    kind = label_kind(column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kind == "text":
        names = _names(column)
        if not classes:
            return names.cast(pa.int64())
        numbers = pc.index_in(names, pa.array(classes, pa.string()))
        if numbers.null_count > names.null_count:
            odd = names.filter(pc.and_(numbers.is_null(), names.is_valid()))
            raise ValueError(f"holds {odd[0].as_py()!r}, which is no class of the data")
        return numbers.cast(pa.int64())
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
        values = column.drop_null().to_numpy()
        if len(odd := values[values != np.floor(values)]) or len(odd := values[np.abs(values) >= 2**63]):
            raise ValueError(f"holds {odd[0]:g}; labels are whole numbers from 0 on")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError("holds a number of more than 64 bits") from error


def _names(column: pa.Array) -> pa.Array:
    """Text as strings without space around it; null for empty text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(text, ""), None, text)


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 19
