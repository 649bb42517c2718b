"""Sends each kind of message to MLflow."""

import json
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from pipeline.tracking.write_buffer import WriteBuffer

BATCH = 1000
"""Largest number of metrics in one `log_batch`."""


def send_message(client: MlflowClient, run_id: str, buffer: WriteBuffer, kind: str, content: Any) -> None:
    """Send one message of a run to its tracking store; `buffer` records the steps sent. Raises the store's error."""
    match kind:
        case "metrics":
            for first in range(0, len(content), BATCH):
                client.log_batch(run_id, metrics=[Metric(*point) for point in content[first : first + BATCH]])
        case (
            "curves" | "shown_curves"
        ):  # only steps that are not logged yet: a resumed run repeats those since its checkpoint
            sent = buffer.sent_steps()
            fresh = [point for point in content if point[3] > sent.get(point[0], -1)]
            send_message(client, run_id, buffer, "metrics", fresh)
            if fresh:
                if kind == "curves":  # those of a nested run are in the file already
                    buffer.record(fresh)
                buffer.set_sent_steps(sent | {name: step for name, _, _, step in fresh})
        case "params":
            known = client.get_run(run_id).data.params
            params = [Param(key, value) for key, value in content.items() if key not in known]
            for first in range(0, len(params), 100):
                client.log_batch(run_id, params=params[first : first + 100])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in content.items()])
        case "dataset":
            name, digest, source, context = content
            dataset = Dataset(name, digest, source_type="location", source=json.dumps({"location": source}))
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
        case _:
            calls: dict[str, Callable[..., object]] = {
                "text": client.log_text,
                "dict": client.log_dict,
                "file": client.log_artifact,
                "folder": client.log_artifacts,
                "status": client.set_terminated,
            }
            calls[kind](run_id, *content)
