"""Shell completion of the jobs' arguments, through argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.tree import JobRoot

TYPES = {"", "bool", "int", "float", "str", "list", "tuple", "mapping", "none"}
"""Words for types in the listing of fields; any other word there is a value."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Print completions and exit if the shell asks for them; otherwise return."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def complete_item(roots: Sequence[type[JobRoot]], prefix: str, **_: Any) -> Iterator[str]:
    """Completions of `recipe.yaml | key=value`: recipes, fields of the job, and the values or files of a field."""
    from argcomplete.completers import FilesCompleter

    from jobs._cli import RECIPES
    from pipeline.config.tree import iter_fields

    fields = {line.key: line.type for line in iter_fields(*roots)}
    key, equals, value = prefix.partition("=")
    if not equals:
        yield from (f"{field}=" for field in fields)
        yield from FilesCompleter(("yaml", "yml"))(prefix)
        yield from (recipe.name for recipe in RECIPES.glob("*.yaml"))
        return
    kind = fields.get(key, "")
    options = ("true", "false") if kind == "bool" else [option for option in kind.split("|") if option not in TYPES]
    yield from (f"{key}={option}" for option in options or FilesCompleter()(value))
