"""Content-addressed names: equal inputs have equal ids, other inputs other ids, so that nothing is ever mixed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.storage.names import folder_name

if TYPE_CHECKING:
    from teachers.base import TeacherSpec

FORMAT_VERSION = 3
"""Of the folders and files of a cache."""
FEATURES_VERSION = 2
"""Of what a teacher's rows hold."""
_SEAL = b'{"checksum":"'


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, independent of the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sealed(meta: dict[str, Any], indent: int | None = 2) -> bytes:
    """A JSON object with its own digest, as the field ``checksum``.

    Without `indent` it is one line, whose checksum comes first and is that of the rest as it is: a plan reads ten thousands.
    """
    text = _canonical(meta)
    if indent is None:
        return _sealing(text) + text[1:]
    return json.dumps({**meta, "checksum": hashlib.sha256(text).hexdigest()}, indent=indent, sort_keys=True).encode()


def _sealing(text: bytes) -> bytes:
    """What begins such a line, in place of the brace of its canonical text."""
    return _SEAL + hashlib.sha256(text).hexdigest().encode() + b'",'


def unsealed(data: bytes) -> dict[str, Any]:
    """The inverse of `sealed`; ValueError if a byte has changed."""
    try:
        text = b"{" + data[len(_SEAL) + 66 :]
        if data.startswith(_sealing(text)):
            return dict(json.loads(text))
        meta: dict[str, Any] = json.loads(data)
        checksum = meta.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no JSON object with a checksum: {error}") from error
    if checksum != digest(meta):
        raise ValueError("its content does not have its checksum")
    return meta


def check_format(meta: dict[str, Any], uri: str) -> None:
    """Raise UserError if a description below `uri` is of another cache format; KeyError if it names none."""
    if meta["format"] != FORMAT_VERSION:
        raise UserError(
            f"{uri} has cache format {meta['format']}, this version reads {FORMAT_VERSION}: name another cache.uri"
        )


def fingerprint(table: pa.Table) -> str:
    """SHA-256 over the values of a table, in its order."""
    state = hashlib.sha256()
    for batch in table.combine_chunks().to_batches():
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        state.update("".join(f"{row}\n" for row in rows).encode())
    return state.hexdigest()


def teacher_identity(
    spec: TeacherSpec, codec: str, precision: str, basis: str | None = None, decoder: str = "cpu", share: float = 1.0
) -> dict[str, Any]:
    """Everything that decides the numbers of a cached teacher, JSON-ready.

    Args:
        basis: names a projection other than the first.
        decoder: that of the teacher's JPEGs, `cpu` or `nvjpeg`.
        share: of the images that it is asked about.
    """
    # Version 0.1 compressed values in token order.
    order = {"order": "by channel"} if codec.endswith("-zstd") else {}
    projection = {"basis": basis} if basis else {}
    pixels = {} if decoder == "cpu" else {"decoder": decoder}
    asked = {} if share == 1 else {"share": share}
    return {
        "format": FEATURES_VERSION,
        "codec": codec,
        **order,
        **projection,
        **pixels,
        **asked,
        "precision": precision,
        **spec.identity(),
    }


def teacher_id(
    spec: TeacherSpec, codec: str, precision: str, basis: str | None = None, decoder: str = "cpu", share: float = 1.0
) -> str:
    """Folder of a teacher: its readable name and a short hash of its identity.

    The readable name is that of the architecture, so that an alias finds the shards cached under the full name.
    """
    identity = json.loads(json.dumps(teacher_identity(spec, codec, precision, basis, decoder, share)))
    return f"{folder_name(spec.architecture.rsplit('/', 1)[-1])}-{digest(identity)[:10]}"
