"""How each kind of letter of an outbox is told to MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from pipeline.tracking.outbox import Outbox

BATCH = 1000
"""Most metrics that one `log_batch` takes."""

Point = tuple[str, float, int, int]
"""Name, value, time in ms and step."""


@dataclass(frozen=True)
class Desk:
    """Sends letters of one run.

    Attributes:
        client: of the tracking store.
        run_id: of the run.
        outbox: that the letters lie in; it knows which steps were sent.
    """

    client: MlflowClient
    run_id: str
    outbox: Outbox

    def send(self, kind: str, content: Any) -> None:
        """Send one; raises what the store says."""
        _SEND[kind](self, content)


def _metrics(desk: Desk, points: Iterable[Point]) -> None:
    metrics = (Metric(*point) for point in points)
    while batch := list(islice(metrics, BATCH)):
        desk.client.log_batch(desk.run_id, metrics=batch)


def _curves(desk: Desk, points: Iterable[Point]) -> None:
    """Steps that are repeated after a crash were logged by those who died."""
    marks = desk.outbox.marks()
    fresh = [point for point in points if point[3] > marks.get(point[0], -1)]
    _metrics(desk, fresh)
    if fresh:
        desk.outbox.mark(marks | {name: step for name, _, _, step in fresh})


def _params(desk: Desk, params: Mapping[str, str]) -> None:
    known = desk.client.get_run(desk.run_id).data.params
    fresh = [Param(key, value) for key, value in params.items() if key not in known]
    for first in range(0, len(fresh), 100):
        desk.client.log_batch(desk.run_id, params=fresh[first : first + 100])


def _tags(desk: Desk, tags: Mapping[str, str]) -> None:
    desk.client.log_batch(desk.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _dataset(desk: Desk, content: Sequence[str]) -> None:
    name, digest, source, context = content
    dataset = Dataset(name, digest, source_type="location", source=json.dumps({"location": source}))
    desk.client.log_inputs(desk.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


_SEND: dict[str, Callable[[Desk, Any], None]] = {
    "metrics": _metrics,
    "curves": _curves,
    "params": _params,
    "tags": _tags,
    "dataset": _dataset,
    "text": lambda desk, content: desk.client.log_text(desk.run_id, *content),
    "dict": lambda desk, content: desk.client.log_dict(desk.run_id, *content),
    "file": lambda desk, content: desk.client.log_artifact(desk.run_id, *content),
    "folder": lambda desk, content: desk.client.log_artifacts(desk.run_id, *content),
    "status": lambda desk, content: desk.client.set_terminated(desk.run_id, *content),
}
