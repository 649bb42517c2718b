"""The one exception that a job turns into a single clear line and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

from teachers.errors import one_line as one_line


class UserError(Exception):
    """What was asked cannot be done as asked; the message is one line that names it (file, field, flag) and the remedy."""


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Within, a UserError is about the value of this field, and says so first."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
