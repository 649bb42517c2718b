"""Shell completion of the jobs' arguments, through argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

TYPES = {"", "bool", "int", "float", "str", "list", "tuple", "mapping", "none"}
"""Names of types in the listing of fields; whatever else stands there is a value."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Print completions and exit if the shell asks for them; otherwise return."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def complete_item(prefix: str, **_: Any) -> Iterator[str]:
    """Completions of `recipe.yaml | key=value`: recipes, fields, and the values or files of a field."""
    from argcomplete.completers import FilesCompleter

    from jobs._cli import RECIPES
    from pipeline.config.load import iter_fields

    key, equals, value = prefix.partition("=")
    if not equals:
        yield from (f"{field}=" for field, *_ in iter_fields())
        yield from FilesCompleter(("yaml", "yml"))(prefix)
        yield from (recipe.name for recipe in RECIPES.glob("*.yaml"))
        return
    kind = next((kind for field, kind, *_ in iter_fields() if field == key), "")
    options = ("true", "false") if kind == "bool" else [option for option in kind.split("|") if option not in TYPES]
    yield from (f"{key}={option}" for option in options or FilesCompleter()(value))
