"""What is logged of a run: messages that wait in a buffer for the process that sends them. Does not import MLflow."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime.metrics import export_training
from pipeline.tracking.write_buffer import Point, WriteBuffer

PARAM_LENGTH = 6000
"""Longest value of a parameter; the artifact `config.yaml` holds values in full."""

log = logging.getLogger(__name__)


@dataclass
class RunLog:
    """Appends to the buffer of a run, so that logging does not fail while the server is down. Picklable.

    Attributes:
        parent: the run of the job that this run is nested in; it shows the curves and pictures too.
    """

    run_id: str
    buffer: WriteBuffer
    parent: RunLog | None = field(default=None, repr=False, compare=False, kw_only=True)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; long values are cut, and a parameter that is already logged keeps its value."""
        self._post("params", {key: str(value)[:PARAM_LENGTH] for key, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._post("tags", {key: str(value)[:PARAM_LENGTH] for key, value in tags.items()})

    def set_student_run(self, run_id: str | None) -> None:
        """Tag this run with the one that trained its student, if that is known."""
        if run_id:
            self.set_tags({"student_run": run_id})

    def log_metrics(self, history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log curves, (step, metrics), without steps that are already logged and values that are not finite."""
        history = list(history)
        export_training(history)
        self._post("curves", _points(history))
        if self.parent:
            self.parent._post("shown_curves", _points(history))

    def log_metric_dict(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step; MLflow shows the last value logged."""
        self._post("metrics", _points([(step, metrics)]))

    def log_text(self, text: str, path: str) -> None:
        """Log text as the artifact `path`."""
        self._post("text", [text, path])

    def log_dict(self, value: Mapping[str, Any], path: str) -> None:
        """Log a JSON or YAML artifact, by the extension of `path`."""
        self._post("dict", [dict(value), path])

    def log_file(self, file: Path, folder: str) -> None:
        """Log a file into an artifact folder, with its content at the time of sending."""
        self._post("file", [str(file), folder])

    def log_reference(self, file: Path, place: str, path: str) -> None:
        """Log the location `place`, size and SHA-256 of a large file (`file` or its copy) as the JSON artifact `path`."""
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        self.log_dict({"file": place, "bytes": file.stat().st_size, "sha256": digest}, path)

    def log_picture(self, file: Path, folder: str) -> None:
        """Log a file as `log_file` does, here and in the job's run."""
        for run in (self, self.parent) if self.parent else (self,):
            run.log_file(file, folder)

    def log_folder(self, source: Path, folder: str) -> None:
        """Log the files of a local folder into an artifact folder, with their content at the time of sending."""
        self._post("folder", [str(source), folder])

    def log_dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """Log a dataset as an input: its content-addressed name, location and digest, and its use (`context`)."""
        self._post("dataset", [name, digest[:36], source, context])

    def _post(self, kind: str, content: Any) -> None:
        try:
            self.buffer.append(kind, content)
        except UserError as error:
            log.warning("%s is not logged: %s", kind, error)


def _points(history: Iterable[tuple[int, Mapping[str, float]]]) -> list[Point]:
    """The finite values; stores refuse or alter others."""
    now = int(time.time() * 1000)
    return [
        (name, float(value), now, step)
        for step, metrics in history
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
