"""Unsent messages to MLflow: small files in the run's folder, sent and deleted in order by a thread of the job's process.

So training never waits for a server that is down, workers and Ray Train's controller need neither an address nor
credentials, memory stays bounded, and the next start sends the files that a killed process left. Sending a file twice is
harmless: stores drop a metric with the same value, step and time.

This module does not import MLflow, which takes a process that only appends seconds and a hundred megabytes.
"""

import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import one_line
from pipeline.storage.store import Store

SENT_STEPS = "marks"
"""File with the highest step sent of each curve."""

log = logging.getLogger(__name__)

Point = tuple[str, float, int, int]
"""Name, value, time in ms and step."""


@dataclass(frozen=True)
class WriteBuffer:
    """A folder of messages, in order, which the sending process must see. Picklable: every process of a job may append.

    <run>/unsent/<MLflow run id>/    messages
    <run>/metrics.jsonl              curves as they were sent, a line per step, for programs without MLflow
    """

    store: Store

    def append(self, kind: str, content: Any) -> None:
        """Append a message with JSON-serialisable content."""
        latest = max((int(name.split("-")[0]) for name in self.pending()), default=0)
        number = max(time.time_ns(), latest + 1)  # in order even after the clock was set back
        message = {"kind": kind, "content": content}
        self.store.put(f"{number:020d}-{uuid.uuid4().hex[:8]}.json", json.dumps(message).encode())

    def pending(self) -> list[str]:
        """Names of the messages, oldest first."""
        return sorted(name for name in self.store.files() if name.endswith(".json"))

    def read(self, name: str) -> tuple[str, Any]:
        """Kind and content of a message."""
        message = json.loads(self.store.get(name))
        return message["kind"], message["content"]

    def discard(self, kind: str) -> None:
        """Delete the messages of a kind."""
        for name in self.pending():
            if self.read(name)[0] == kind:
                self.store.delete(name)

    def record(self, points: Sequence[Point]) -> None:
        """Append points to `metrics.jsonl`."""
        steps: dict[int, dict[str, float]] = {}
        for name, value, _, step in points:
            steps.setdefault(step, {})[name] = value
        try:
            with Path(self.store.uri).parents[1].joinpath("metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **values}) + "\n" for step, values in sorted(steps.items()))
        except OSError as error:  # MLflow has them
            log.warning("metrics.jsonl lacks %d steps: %s", len(steps), one_line(error))

    def sent_steps(self) -> dict[str, int]:
        """Highest step sent of each curve."""
        steps: dict[str, int] = json.loads(self.store.get(SENT_STEPS)) if self.store.exists(SENT_STEPS) else {}
        return steps

    def set_sent_steps(self, steps: dict[str, int]) -> None:
        """Record these steps as sent."""
        self.store.put(SENT_STEPS, json.dumps(steps).encode())
