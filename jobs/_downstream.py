"""The evaluations of fine-tuned models behind `jobs/evaluate.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jobs._cli import table
from pipeline.config import Config
from pipeline.downstream.job import evaluate_model, open_held_out, open_model
from pipeline.downstream.task import DOWNSTREAM
from pipeline.job import open_job


def evaluate_saved(task: str, config: Config, dry_run: bool) -> dict[str, Any]:
    """Metrics of `evaluate.model` on data.val, with the settings that the recipe gives."""
    saved = open_model(config, task)
    val = open_held_out(config, saved)
    print(f"{task} of {config.evaluate.model} on {len(val)} images from {val.location}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, f"evaluate-{task}") as job:
        report = evaluate_model(config, saved, val, job.run, job.state.folder)
    rows = {
        **{name: f"{value:.3f}" for name, value in report.metrics.items()},
        "tables, pictures": str(job.state.folder / "evaluation"),
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}",
    }
    print(f"done\n{table(rows)}")
    return {**report.metrics, "mlflow_run_id": job.run.run_id}


DOWNSTREAM_EVALUATIONS: dict[str, Callable[[Config, bool], dict[str, Any]]] = {
    name: partial(evaluate_saved, name) for name in DOWNSTREAM
}


def long_name(evaluation: str, argument: str) -> str:
    """`annotations=` and `results=` of coco-results stand for the fields of that name in `evaluate`."""
    short = evaluation == "coco-results" and argument.startswith(("annotations=", "results="))
    return f"evaluate.{argument}" if short else argument
