"""What training commits, as curves of a run. As `pipeline/distill/commits.py`, it imports neither MLflow nor a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tracking.run_log import RunLog
    from pipeline.training.task import History


def log_commit(run: RunLog, history: History, checkpoint: str | None) -> None:
    """Log the curves, and the place of the checkpoint."""
    run.log_metrics(history)
    if checkpoint:
        run.set_tags({"checkpoint": checkpoint})
