"""What a run has still to tell MLflow: a folder of small files beside its checkpoints, sent by the job's own process.

Whoever logs writes a file and goes on; one thread of the process that opened the run sends the files in order and removes
each when it is sent. So training never waits for a server that is down, workers and Ray Train's controller need neither
an address nor credentials, memory stays bounded, and what a process that is killed has not sent is sent by the next start.
A file that is sent twice, since a process died in between, does no harm: stores drop a metric of the same value, step
and time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow.exceptions import MlflowException
from requests import HTTPError

from pipeline.errors import UserError, one_line
from pipeline.storage.store import Store

WAIT_S = 10.0
"""Longest time that a call waits for a server that answered so far; for one that does not, no call waits."""
PATIENCE_S = 300.0
"""Time that a job waits, where it cannot go on without the server, for one that does not answer."""
POLL_S = 0.5
"""How often the buffer is looked into for what other processes have put there."""
LONGEST_PAUSE_S = 8.0

REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
"""Error codes of what the server will never take; whatever else fails is tried again."""

MARKS = "marks"
"""File with the highest step that was sent of each curve."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriteBuffer:
    """A folder of messages, in order. Picklable: every process of a job may post.

    Attributes:
        store: the folder, which the process that sends must see.
    """

    store: Store

    def append(self, kind: str, content: Any) -> None:
        """Put a message in: what it is, and its content, of which JSON can be made."""
        latest = max((int(name.split("-")[0]) for name in self.pending()), default=0)
        # A clock that is set back must not bring a message before one that waits already.
        number = max(time.time_ns(), latest + 1)
        message = {"kind": kind, "content": content}
        self.store.put(f"{number:020d}-{uuid.uuid4().hex[:8]}.json", json.dumps(message).encode())

    def pending(self) -> list[str]:
        """Names of the messages that wait, oldest first."""
        return sorted(name for name in self.store.files() if name.endswith(".json"))

    def read(self, name: str) -> tuple[str, Any]:
        """Kind and content of a message."""
        message = json.loads(self.store.get(name))
        return message["kind"], message["content"]

    def discard(self, kind: str) -> None:
        """Throw away the messages of a kind that wait."""
        for name in self.pending():
            if self.read(name)[0] == kind:
                self.store.delete(name)

    def sent_steps(self) -> dict[str, int]:
        """Highest step that was sent of each curve."""
        known: dict[str, int] = json.loads(self.store.get(MARKS)) if self.store.exists(MARKS) else {}
        return known

    def set_sent_steps(self, marks: dict[str, int]) -> None:
        """Remember these steps as sent."""
        self.store.put(MARKS, json.dumps(marks).encode())


class Sender:
    """Sends what is in an buffer, in a thread, until it is closed.

    Args:
        buffer: where messages wait.
        send: takes kind and content of one; raises what the server says.
        address: of the server, for people.
    """

    def __init__(self, buffer: WriteBuffer, send: Callable[[str, Any], None], address: str) -> None:
        self.buffer, self.send, self.address = buffer, send, address
        self.state = threading.Condition()
        self.woken = self.closed = False
        self.problem = ""  # why the server could not be told, while it cannot
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def flush(self, patience: float | None = None) -> bool:
        """Wait until nothing is left to send; gives whether that is so.

        Args:
            patience: seconds; None: `WAIT_S`, and none at all while the server does not answer.
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
        """Send no more."""
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
                    self._recovered()
                    pause = POLL_S
            except Exception as error:  # noqa: BLE001  whatever it is, training goes on
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
            log.warning("MLflow at %s does not take %s: %s", self.address, kind, one_line(error))
        self.buffer.store.delete(name)

    def _failed(self, error: Exception) -> None:
        if not self.problem:
            log.warning(
                "MLflow at %s cannot be told (%s); what is logged waits in %s and is sent when it answers",
                self.address,
                one_line(error),
                self.buffer.store.uri,
            )
        self.problem = one_line(error)

    def _recovered(self) -> None:
        if self.problem:
            log.warning("MLflow at %s answers again", self.address)
        self.problem = ""


def retry_until_reachable(address: str, call: Callable[[], Any]) -> Any:
    """What `call` gives, tried again while the server does not answer.

    Raises:
        UserError: where it does not within `PATIENCE_S`; the same command goes on from here.
    """
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
    """What a user is told where a job cannot end without the server."""
    return UserError(
        f"MLflow at {address} does not answer ({reason}); nothing is lost: start that server again, and the same command "
        "sends what is left"
    )


def is_permanent(error: Exception) -> bool:
    """Whether an error is an answer that stays the same, and not a server or a network that is down."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, HTTPError):
        return error.response is not None and error.response.status_code in (400, 404, 413)
    return isinstance(error, FileNotFoundError | TypeError | ValueError | KeyError | AttributeError)
