"""The one exception that a job turns into a single clear line and exit code 2."""


class UserError(Exception):
    """What was asked cannot be done as asked; the message is one line that names it (file, field, flag) and the remedy."""
