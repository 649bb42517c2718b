"""What training commits, as curves and figures of a run.

Ray Train's controller logs it, a process that needs neither MLflow nor the student, whose imports take seconds: this module
imports neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # these import torch, timm and MLflow
    from pipeline.tracking.run_log import RunLog
    from pipeline.training.task import History


class Start(NamedTuple):
    """Epochs, steps and images of a run before one of its phases."""

    epochs: int
    steps: int
    samples: int

    def shift(self, history: Sequence[tuple[int, dict[str, float]]]) -> History:
        """A history of this phase, with steps, epochs and samples counted from the start of the run."""
        offsets = {"epoch": self.epochs, "samples_seen": self.samples}
        return [
            (step + self.steps, {name: value + offsets.get(name, 0) for name, value in metrics.items()})
            for step, metrics in history
        ]


def log_commit(run: RunLog, start: Start, figures: Path, history: History, checkpoint: str | None) -> None:
    """Log the curves, the figures in a folder if there was an evaluation, and the place of the checkpoint."""
    run.log_metrics(start.shift(history))
    if any("loss" not in metrics for _, metrics in history):
        for figure in sorted(figures.glob("[!.]*.png")):
            run.log_picture(figure, "figures")
    if checkpoint:
        run.set_tags({"checkpoint": checkpoint})
