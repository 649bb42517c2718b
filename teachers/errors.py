"""What may be wrong with a teacher; imports no torch, so that a job can say it at once."""

import textwrap


class TeacherError(Exception):
    """A teacher cannot be made as asked; the message is one line that names what is wrong and the remedy."""


class WeightsNotFoundError(TeacherError):
    """No hub and no local file holds the weights that were asked for."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an exception as one line, cut at a word, with `...`, where it is longer than `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")
