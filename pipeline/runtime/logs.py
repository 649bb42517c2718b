"""Log records with the fields run, stage and shard: plain lines, or JSON lines if REGLA_LOG=json.

The fields travel with the work, in the rows of a Ray Data pipeline and the payload of a training worker.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

_current: ContextVar[Mapping[str, str]] = ContextVar("fields of log records", default=MappingProxyType({}))


def json_lines() -> bool:
    """Whether logs and progress are JSON lines: the environment variable REGLA_LOG is ``json``."""
    return os.environ.get("REGLA_LOG") == "json"


def fields() -> dict[str, str]:
    """Fields of this thread's records."""
    return dict(_current.get())


@contextmanager
def context(**known: str) -> Iterator[None]:
    """Add fields (``run``, ``stage``, ``shard``) to the records within."""
    token = _current.set({**_current.get(), **known})
    try:
        yield
    finally:
        _current.reset(token)


def set_context(**known: str) -> None:
    """Add fields to all further records of this thread."""
    _current.set({**_current.get(), **known})


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Silence the logger of this name below errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Copy:
    """A text stream that also writes to a file what it is given, except for progress bars."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        """Write to both."""
        if "\r" not in text and "\x1b" not in text:
            with suppress(OSError):  # a full disk must not end the job here
                self.file.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def copied_to(file: Path) -> Iterator[None]:
    """Append to a file what this process prints and logs, with the time at its beginning."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", buffering=1, encoding="utf-8", errors="backslashreplace") as copy:
        copy.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} {shlex.join(sys.argv)}\n")
        handler = logging.StreamHandler(copy)
        handler.setFormatter(Plain())
        logging.getLogger().addHandler(handler)
        out: Any = _Copy(sys.stdout, copy)
        try:
            with redirect_stdout(out):
                yield
        finally:
            logging.getLogger().removeHandler(handler)


@contextmanager
def shard_context(row: Mapping[str, Any], stage: str) -> Iterator[None]:
    """Add the fields of a row (``part`` or ``split``, ``shard``, ``log`` from `row_context`) and the stage to the records."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None:
        configure_worker()
    known = json.loads(row.get("log", "{}"))
    with context(**{**known, "stage": stage, "shard": f"{row.get('part', row.get('split'))}/{row['shard']}"}):
        yield


def row_context() -> dict[str, str]:
    """This thread's fields as a column of a row, for `shard_context` in another process."""
    return {"log": json.dumps(fields())}


def configure() -> None:
    """Write records of this process to stderr, unless a handler exists already."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_handler())
        root.setLevel(logging.WARNING)
    if json_lines():
        logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if json_lines() else Plain())
    return handler


def configure_worker() -> None:
    """Write this package's records in a Ray worker, whose root logger is Ray's."""
    logger = logging.getLogger("pipeline")
    if logger.propagate:
        logger.addHandler(_handler())
        logger.setLevel(logging.INFO if json_lines() else logging.WARNING)
        logger.propagate = False


class Plain(logging.Formatter):
    """``WARNING: message [stage shard]``, without the run."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, for people."""
        where = " ".join(value for name in ("stage", "shard") if (value := _current.get().get(name)))
        text = f"{record.levelname}: {record.getMessage()}{f' [{where}]' if where else ''}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonLines(logging.Formatter):
    """One JSON object per line, with `figures` of the record's `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, for machines."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **_current.get(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)
