"""YAML as people expect it: the scalars of YAML 1.2, and no key twice.

PyYAML reads YAML 1.1, where `010` is 8, `no` is false, `1:30` is 90, `2024-01-01` is a date and `1e-3` is a string.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema (section 10.3.2), with decimal numbers only; `1_000` stays a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def read_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: with the reason in one line and, in a text of several lines, the number of the line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark and "\n" in text.strip() else ""
        raise ValueError(f"{line}{error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def read_inline_yaml(text: str) -> Any:
    """The value of a text of one line, in which `#` begins no comment. Raises ValueError as :func:`read_yaml` does."""
    value = read_yaml(text)
    node = yaml.compose(text, Loader=_Loader)
    if rest := text[node.end_mark.index if node else 0 :].strip():
        raise ValueError(f"{rest!r} follows the value")
    return value
