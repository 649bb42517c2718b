"""Read the images that nobody has read: their keys, and why one cannot be used.

Only then is it known which of them the cache holds already, under whatever name. A Ray Data row is a slice of a listing.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import simplejpeg

from pipeline.cache.layout.dataset import BAD_SCHEMA
from pipeline.cache.layout.part import KEY, image_key
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image, decode_upright_jpeg
from pipeline.runtime import logs
from pipeline.sources.base import INDEX_SCHEMA, Source

SLICE = 512
"""Rows of a slice."""
KEYED_SCHEMA = pa.schema([*INDEX_SCHEMA, pa.field("key", KEY, nullable=False)])
"""Rows of an index with the keys of their images."""


@dataclass(frozen=True)
class Digest:
    """Reads a slice of the listing of a split, whose rows travel as Arrow's IPC stream."""

    sources: Mapping[str, Source]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read `row["listed"]` of `row["split"]`.

        Returns:
            The row with ``keys`` (16 bytes each, zeros for a bad image), ``bad`` (JSON of reasons, and whether the bytes were
            read, by number in the slice) and ``error`` (a user-fixable failure in one line, or "").
        """
        keys, bad = [], {}
        try:
            with logs.shard_context(row, "read"):
                for number, data in enumerate(self.sources[row["split"]].read(unpacked(row["listed"]))):
                    if reason := unreadable(data):
                        bad[number] = [reason, not isinstance(data, Exception)]
                    keys.append(bytes(16) if reason or isinstance(data, Exception) else image_key(data))
        except UserError as error:
            return {**row, "keys": b"", "bad": "{}", "error": str(error)}
        return {**row, "keys": b"".join(keys), "bad": json.dumps(bad), "error": ""}


def slices(split: str, new: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows for `Digest` of what is new in a split."""
    for shard, first in enumerate(range(0, new.num_rows, SLICE)):
        yield {"split": split, "shard": shard, "listed": packed(new.slice(first, SLICE))}


def keyed(row: Mapping[str, Any]) -> tuple[pa.Table, pa.Table]:
    """What `Digest` found in a slice: the images with their keys (`KEYED_SCHEMA`), and the bad ones (`BAD_SCHEMA`)."""
    listed, reasons = unpacked(row["listed"]), {int(n): found for n, found in json.loads(row["bad"]).items()}
    width = KEY.byte_width
    keys = [row["keys"][first : first + width] for first in range(0, len(row["keys"]), width)]
    good = [number for number in range(listed.num_rows) if number not in reasons]
    images = listed.take(pa.array(good, pa.int64())).append_column(
        KEYED_SCHEMA.field("key"), pa.array([keys[n] for n in good], KEY)
    )
    bad = listed.take(pa.array([*reasons], pa.int64()))
    return images.cast(KEYED_SCHEMA), with_reasons(bad, [*reasons.values()])


def with_reasons(rows: pa.Table, reasons: Sequence[tuple[str, bool]]) -> pa.Table:
    """Rows of an index as samples that cannot be used (`BAD_SCHEMA`): why, and whether their bytes could be read."""
    for at, name in enumerate(("reason", "read")):
        field = BAD_SCHEMA.field(name)
        rows = rows.append_column(field, pa.array([reason[at] for reason in reasons], field.type))
    return rows.cast(BAD_SCHEMA)


def packed(table: pa.Table) -> bytes:
    """A table as an IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpacked(data: bytes) -> pa.Table:
    """The inverse of `packed`."""
    return pa.ipc.open_stream(data).read_all()


def unreadable(data: bytes | Exception) -> str:
    """Why an image cannot be used, or "".

    Pillow silently decodes around damage inside a JPEG's scan data; a strict decode finds most of it.
    """
    if isinstance(data, Exception):
        return f"{type(data).__name__}: {data}"
    if decode_upright_jpeg(data) is not None:
        return ""
    try:
        decode_image(data)
        if data.startswith(b"\xff\xd8"):
            stored = simplejpeg.decode_jpeg_header(data)[2]
            simplejpeg.decode_jpeg(data, colorspace="CMYK" if stored in ("CMYK", "YCCK") else "RGB", strict=True)
    except ValueError as error:
        return str(error)
    return ""
