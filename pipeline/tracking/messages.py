"""Sends each kind of message to MLflow."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from pipeline.tracking.write_buffer import WriteBuffer

BATCH = 1000
"""Largest number of metrics in one `log_batch`."""

Point = tuple[str, float, int, int]
"""Name, value, time in ms and step."""


@dataclass(frozen=True)
class MlflowWriter:
    """Sends the messages of one run to its tracking store; `buffer` records the steps sent."""

    client: MlflowClient
    run_id: str
    buffer: WriteBuffer

    def send(self, kind: str, content: Any) -> None:
        """Send one message; raises the store's error."""
        _SEND[kind](self, content)


def _metrics(writer: MlflowWriter, points: Iterable[Point]) -> None:
    metrics = (Metric(*point) for point in points)
    while batch := list(islice(metrics, BATCH)):
        writer.client.log_batch(writer.run_id, metrics=batch)


def _curves(writer: MlflowWriter, points: Iterable[Point]) -> None:
    """Send only steps that are not logged yet: a resumed run repeats those since its checkpoint."""
    sent = writer.buffer.sent_steps()
    fresh = [point for point in points if point[3] > sent.get(point[0], -1)]
    _metrics(writer, fresh)
    if fresh:
        writer.buffer.set_sent_steps(sent | {name: step for name, _, _, step in fresh})


def _params(writer: MlflowWriter, params: Mapping[str, str]) -> None:
    known = writer.client.get_run(writer.run_id).data.params
    fresh = [Param(key, value) for key, value in params.items() if key not in known]
    for first in range(0, len(fresh), 100):
        writer.client.log_batch(writer.run_id, params=fresh[first : first + 100])


def _dataset(writer: MlflowWriter, content: Sequence[str]) -> None:
    name, digest, source, context = content
    dataset = Dataset(name, digest, source_type="location", source=json.dumps({"location": source}))
    writer.client.log_inputs(writer.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


_SEND: dict[str, Callable[[MlflowWriter, Any], object]] = {
    "metrics": _metrics,
    "curves": _curves,
    "params": _params,
    "tags": lambda writer, tags: writer.client.log_batch(writer.run_id, tags=[RunTag(*tag) for tag in tags.items()]),
    "dataset": _dataset,
    "text": lambda writer, content: writer.client.log_text(writer.run_id, *content),
    "dict": lambda writer, content: writer.client.log_dict(writer.run_id, *content),
    "file": lambda writer, content: writer.client.log_artifact(writer.run_id, *content),
    "folder": lambda writer, content: writer.client.log_artifacts(writer.run_id, *content),
    "status": lambda writer, content: writer.client.set_terminated(writer.run_id, *content),
}
