"""The thread of a job's process that sends the messages of a write buffer to MLflow."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from requests import HTTPError

from pipeline.errors import UserError, one_line
from pipeline.tracking.write_buffer import WriteBuffer

WAIT_S = 10.0
"""Maximum wait of a call while the server answers; otherwise calls do not wait."""
PATIENCE_S = 300.0
"""Maximum wait for the server where a job cannot continue without it."""
POLL_S = 0.5
"""Seconds between checks for messages from other processes."""
LONGEST_PAUSE_S = 8.0

REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
"""Error codes of requests that never succeed; all others are retried."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Sender:
    """A thread that sends the messages of a buffer until it is closed.

    Args:
        send: sends one message, given its kind and content; raises the server's error.
        address: of the server, for log messages.
    """

    def __init__(self, buffer: WriteBuffer, send: Callable[[str, Any], None], address: str) -> None:
        self.buffer, self.send, self.address = buffer, send, address
        self.state = threading.Condition()
        self.woken = self.closed = False
        self.problem = ""  # why sending fails, while it does
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def flush(self, patience: float | None = None) -> bool:
        """Wait until everything is sent, at most `patience` seconds; returns whether it is.

        None: at most `WAIT_S`, and not at all while the server does not answer.
        """
        deadline = time.monotonic() + (WAIT_S if patience is None else patience)
        with self.state:
            self.woken = True
            self.state.notify_all()
            while self.woken or self.buffer.pending():
                left = deadline - time.monotonic()
                if left <= 0 or (patience is None and self.problem):
                    return False
                self.state.wait(min(left, POLL_S))
        return True

    def close(self) -> None:
        """Stop sending."""
        with self.state:
            self.closed = True
            self.state.notify_all()
        self.thread.join(WAIT_S)

    def _work(self) -> None:
        pause = POLL_S
        while not self.closed:
            with self.state:
                self.woken = False
            try:
                while not self.closed and (messages := self.buffer.pending()):
                    self._send(messages[0])
                    if self.problem:
                        log.warning("MLflow at %s answers again", self.address)
                    self.problem, pause = "", POLL_S
            except Exception as error:  # noqa: BLE001  training continues after any error
                self._failed(error)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            with self.state:
                self.state.notify_all()
                if not self.closed and (self.problem or not self.woken):
                    self.state.wait(pause)

    def _send(self, name: str) -> None:
        kind = "a message"
        try:
            kind, content = self.buffer.read(name)
            self.send(kind, content)
        except Exception as error:
            if not is_permanent(error):
                raise
            log.warning("MLflow at %s refuses %s: %s", self.address, kind, one_line(error))
        self.buffer.store.delete(name)

    def _failed(self, error: Exception) -> None:
        if not self.problem:
            log.warning(
                f"MLflow at {self.address} is unreachable ({one_line(error)}); messages are kept in "
                f"{self.buffer.store.uri} and sent when it answers"
            )
        self.problem = one_line(error)


def retry_until_reachable(address: str, call: Callable[[], Result]) -> Result:
    """The result of `call`, retried while the server does not answer; UserError after `PATIENCE_S`."""
    deadline, pause = time.monotonic() + PATIENCE_S, POLL_S
    while True:
        try:
            return call()
        except Exception as error:
            if is_permanent(error):
                raise
            if time.monotonic() > deadline:
                raise unreachable_error(address, one_line(error)) from error
            log.warning("MLflow at %s does not answer (%s); waiting for it", address, one_line(error))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def unreachable_error(address: str, reason: str) -> UserError:
    """The error of a job that cannot continue without the server."""
    return UserError(
        f"MLflow at {address} does not answer ({reason}); nothing is lost: restart that server, and the same command sends "
        "the rest"
    )


def is_permanent(error: Exception) -> bool:
    """Whether retrying is pointless because the server would answer the same again."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, HTTPError):
        return error.response is not None and error.response.status_code in (400, 404, 413)
    return isinstance(error, FileNotFoundError | TypeError | ValueError | KeyError | AttributeError)
