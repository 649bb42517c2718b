"""The shell commands of README.md and docs/**/*.md, and how each is tried without a cluster, a GPU or ImageNet."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
STARTS = (
    "python ",
    "regla ",
    "make ",
    "ray ",
    "kubectl ",
    "pip ",
    "mlflow ",
    ".venv/",
    ". ",
    "export ",
    "curl ",
    "cd ",
    "git ",
)
"""What a line begins with that is a command, also in a block without a language."""
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Command:
    """One command of a page; `words` are without leading assignments of variables."""

    page: str
    text: str
    words: tuple[str, ...]


def collect() -> list[Command]:
    """Every command, once a page."""
    found = [command for page in PAGES for command in _of(page)]
    return list(dict.fromkeys(found))


def _of(page: Path) -> Iterator[Command]:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        shell = language in ("sh", "bash", "shell", "console") or (not language and block.startswith(STARTS))
        for text in _lines(block) if shell else []:
            for part in re.split(r"\s+&&\s+", text):
                words = shlex.split(part, comments=True)
                while words and ASSIGNMENT.match(words[0]):
                    words = words[1:]
                if words:
                    yield Command(page.relative_to(REPOSITORY).as_posix(), " ".join(part.split()), tuple(words))


def _lines(block: str) -> Iterator[str]:
    """Commands: a line goes on after a backslash, or while a quote is open."""
    text = ""
    for line in block.replace("\\\n", " ").splitlines():
        text = f"{text} {line}" if text else line
        try:
            shlex.split(text, comments=True)
        except ValueError:
            continue
        if text.strip():
            yield text.strip()
        text = ""
    assert not text, f"a quote is left open: {text}"


class _ParsedError(Exception):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def parse(script: str, arguments: list[str]) -> argparse.Namespace:
    """What a script's own parser makes of a command line; the script ends there.

    Raises:
        SystemExit: where it refuses it.
    """
    methods = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}

    def stop(parser: argparse.ArgumentParser, given: list[str] | None, original: Any) -> None:
        raise _ParsedError(original(parser, given))

    with (
        mock.patch.multiple(
            argparse.ArgumentParser,
            **{name: partialmethod(stop, original=original) for name, original in methods.items()},
        ),
        mock.patch.object(sys, "argv", [script, *arguments]),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except _ParsedError as parsed:
            return parsed.options
    raise AssertionError(f"{script} parses no arguments")
