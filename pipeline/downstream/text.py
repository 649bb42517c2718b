"""Text files as editors and spreadsheets write them."""

import codecs
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.files import read_bytes
from pipeline.storage.remote import check_address, is_uri

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by their byte order mark; UTF-32's begins with UTF-16's."""


def read_text(path: str | Path) -> str:
    """The text of a file, by local path or URI: in the encoding of its byte order mark, else UTF-8.

    Raises:
        UserError: if it cannot be read, or is in another encoding.
    """
    if is_uri(str(path)):
        check_address(str(path))
    try:
        data = read_bytes(str(path))
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line} is not {encoding.upper()} text ({error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: is not UTF-8 text (it contains zero bytes); save it as UTF-8")
    return text
