"""Colour and marker of every group, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.compare.group import Group

T = TypeVar("T")

COLOURS = ("#3b6fd4", "#d9622b", "#2a9d63", "#a55ad6", "#c2417c", "#1a97a6", "#9a7b1f", "#6b7280")
"""Distinguishable on white and on black, with a contrast of at least 3 to both."""
SYMBOLS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("star", "*"), ("cross", "P"))
"""Equal markers of plotly and of matplotlib."""


@dataclass(frozen=True)
class Style:
    """How a group is drawn: colour, and markers of plotly and matplotlib."""

    colour: str
    symbol: str
    marker: str


def styles(groups: Sequence[Group]) -> list[Style]:
    """Colour by teachers and marker by student if that distinguishes all groups; otherwise a style per group."""
    teachers = [group.texts.get("teachers", "") for group in groups]
    students = [group.texts.get("student", "") for group in groups]
    if len(set(teachers)) == 1:
        teachers, students = students, teachers
    if len(set(zip(teachers, students, strict=True))) < len(groups):
        teachers, students = [group.label for group in groups], [""] * len(groups)
    return [
        Style(_pick(COLOURS, teachers, teacher), *_pick(SYMBOLS, students, student))
        for teacher, student in zip(teachers, students, strict=True)
    ]


def _pick(values: Sequence[T], names: Sequence[str], name: str) -> T:
    return values[list(dict.fromkeys(names)).index(name) % len(values)]
