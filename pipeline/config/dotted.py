"""Trees of fields as plain mappings: dotted keys, and the problems that validation finds in one line each."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.config.tree import Section, iter_fields, section_of
from pipeline.errors import UserError

S = TypeVar("S", bound=Section)


def keys_of(*models: type[Section]) -> tuple[str, ...]:
    """The dotted keys of all fields; an entry of a list has the number 0."""
    return tuple(line.key for line in iter_fields(*models))


def field_of(key: str) -> str:
    """The field that a dotted key means, as :func:`keys_of` names it."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", key)


def leaves(tree: Mapping[Any, Any], keys: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a tree whose sections may be nested, dotted, or both.

    `keys`, from :func:`keys_of`, distinguish a section from a field that holds a mapping.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and _holds_fields(field_of(key), value, keys):
            yield from leaves(value, keys, f"{key}.")
        else:
            yield key, none_if_named(value)


def _holds_fields(field: str, value: Mapping[Any, Any], keys: Collection[str]) -> bool:
    """Whether a mapping is a section: a known one, or an unknown one whose keys are names, such as a user's task has."""
    if any(known.startswith(f"{field}.") for known in keys):
        return True
    is_value = any(f"{field}.".startswith(f"{known}.") for known in keys)
    return not is_value and all(isinstance(name, str) for name in value)


def is_field(key: str, keys: Collection[str]) -> bool:
    """Whether a key names a field, a section, or an entry of a field that holds a mapping or a list."""
    field = field_of(key)
    return any(f"{known}.".startswith(f"{field}.") or f"{field}.".startswith(f"{known}.") for known in keys)


def none_if_named(value: Any) -> Any:
    """None for the word `none`, which `--help` shows for YAML's null."""
    return None if value == "none" else value


def assign(tree: dict[Any, Any], key: str, value: Any) -> None:
    """Set the field of a dotted key and create missing sections; an index that a list does not have is a UserError."""
    *path, last = key.split(".")
    node: Any = tree
    for position, part in enumerate(path):
        node = _child(node, part, ".".join(path[: position + 1]))
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"{where}: the list has {len(node)} entries, numbered from 0")
        index = int(part)
        if isinstance(node[index], str):
            node[index] = {"model": node[index]}
        return node[index]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def prune(tree: Mapping[Any, Any], model: type[Section]) -> dict[Any, Any]:
    """The part of a tree that a class declares."""
    pruned = {}
    for name, value in tree.items():
        info = model.model_fields.get(str(name))
        if info is None:
            continue
        section = section_of(info)
        if section and isinstance(value, Mapping):
            value = prune(value, section)
        elif section and isinstance(value, list):
            value = [prune(item, section) if isinstance(item, Mapping) else item for item in value]
        pruned[name] = value
    return pruned


def validate(model: type[S], tree: Mapping[Any, Any], where: str = "") -> S:
    """The configuration of a tree, or a UserError that lists every problem in one line after `where`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(problem, model) for problem in error.errors())
        raise UserError(f"{where}: {problems}" if where else problems) from None


def _explain(problem: Any, model: type[Section]) -> str:
    # pydantic also puts the types of a union into the path.
    location, kind = [part for part in problem["loc"] if not re.search(r"[\[-]", str(part))], problem["type"]
    where = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return unknown(where, keys_of(model)) or f"unknown key {where}; --help lists every key"
    if kind == "missing":
        return f"{where} must be given"
    given = "" if isinstance(problem["input"], dict | list) else f", not {problem['input']!r}"
    message = re.sub(r" or instance of \w+", "", problem["msg"].removeprefix("Value error, "))
    if where and message.startswith(f"{where}."):
        return message
    remedy = f"; write '{problem['input']}' in quotes" if kind == "string_type" and given else ""
    return f"{where}: {message[0].lower()}{message[1:]}{given}{remedy}"


def unknown(key: str, keys: Sequence[str]) -> str | None:
    """A message that suggests similar keys of the same depth, or else every field of the same name; None if there are none."""
    parts = ["0" if part.isdecimal() else part for part in key.split(".")]
    names = {".".join(known.split(".")[: len(parts)]) for known in keys}
    near = difflib.get_close_matches(".".join(parts), sorted(names), n=1)
    best = near or [known for known in keys if known.rsplit(".", 1)[-1] == parts[-1]]
    return f"unknown key {key}; did you mean {' or '.join(best)}?" if best else None
