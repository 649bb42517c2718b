"""The one exception that a job turns into a single clear line and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

from teachers.errors import did_you_mean as did_you_mean
from teachers.errors import one_line as one_line


class UserError(Exception):
    """What was asked cannot be done as asked; the message is one line that names it (file, field, flag) and the remedy."""


@contextmanager
def blame_field(field: str) -> Iterator[None]:
    """Prefix the message of a UserError raised inside with the field whose value caused it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
