"""Errors of teachers; imports no torch, so that a job reports them quickly."""

import textwrap


class TeacherError(Exception):
    """A teacher cannot be created as configured; the message is one line with the problem and the remedy."""


class WeightsNotFoundError(TeacherError):
    """The weights are in no local file and no hub."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an exception as one line, cut at a word, with `...`, where it is longer than `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")
