"""Errors of teachers; imports no torch, so that a job reports them quickly."""

import textwrap


class TeacherError(Exception):
    """A teacher cannot be created as configured; the message is one line with the problem and the remedy."""


class WeightsNotFoundError(TeacherError):
    """The weights are neither in a local file nor on the hub."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an exception as one line, cut at a word to `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")
