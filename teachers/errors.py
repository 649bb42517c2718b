"""Errors of teachers; imports no torch, so that a job reports them quickly."""

import difflib
import textwrap
from collections.abc import Iterable


class TeacherError(Exception):
    """A teacher cannot be created as configured; the message is one line with the problem and the remedy."""


class WeightsNotFoundError(TeacherError):
    """The weights are neither in a local file nor on the hub."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an exception as one line, cut at a word to `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")


def did_you_mean(name: str, known: Iterable[str], form: str = "; did you mean {}?", most: int = 1) -> str:
    """The known names that are most similar to an unknown one, in the form that fits a message; "" if none is."""
    near = difflib.get_close_matches(name, [*known], n=most)
    return form.format(", ".join(near)) if near else ""
