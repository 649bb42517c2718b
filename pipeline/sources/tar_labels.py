"""Labels in the members of a tar: which members and fields hold one, and how its number is written."""

import json
import math
import re
from typing import Any

_NAMES = ("cls", "label", "class", "target")
TEXT_EXTENSIONS = tuple(f".{name}{ending}" for name in _NAMES for ending in ("", ".txt"))
"""Members whose text is a class number, in order of preference."""
JSON_EXTENSIONS = (".json", *(f".{name}.json" for name in _NAMES))
"""Members whose JSON is a class number, or an object with one in `label` or, without that, in a field of `FIELDS`."""
FIELDS = (
    "cls",
    "class",
    "class_id",
    "class_index",
    "class_idx",
    "label_id",
    "label_index",
    "label_idx",
    "category_id",
    "target",
)

_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0*)?")


def parse_label(data: bytes, extension: str) -> tuple[int | None, str]:
    """The class number in a member, or None if it holds none; and the field of `FIELDS` that holds something else, or "".

    Raises:
        ValueError: if a text or the field `label` is not a class number, such as a name; the message is a short reason.
    """
    if extension not in JSON_EXTENSIONS:
        return class_number(data.decode()), ""
    content = json.loads(data)
    if not isinstance(content, dict):
        return (None if extension == ".json" else class_number(content)), ""
    if content.get("label") is not None:
        return class_number(content["label"]), ""
    odd = ""
    for name in FIELDS:
        try:
            label = class_number(content.get(name))
        except ValueError:
            odd = odd or name
            continue
        if label is not None:
            return label, ""
    return None, odd


def class_number(value: Any) -> int | None:
    """A number as JSON or text hold it: an integer, a float with an integral value, either as text, or a boolean.

    Null, NaN and empty text are no label.

    Raises:
        ValueError: for anything else, and for more than 64 bits.
    """
    if isinstance(value, str):
        text = value.strip()
        whole = _WHOLE.fullmatch(text)
        value = int(whole[1]) if whole else text or None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int):
        raise ValueError(f"{value!r}; labels are whole numbers from 0 on")
    if value.bit_length() > 63:
        raise ValueError("more than 64 bits")
    return int(value)
