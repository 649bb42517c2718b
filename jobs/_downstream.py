"""The evaluations of fine-tuned models behind `jobs/evaluate.py`."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jobs._cli import grid, table
from pipeline.downstream.base import make_task
from pipeline.downstream.config import CocoResultsJobConfig, EvaluateModelJobConfig
from pipeline.downstream.detect.coco_eval import NUMBERS, evaluate_files
from pipeline.downstream.job import as_saved, evaluate_model, open_held_out, open_model
from pipeline.errors import UserError
from pipeline.runs.session import open_job


def evaluate_saved(config: EvaluateModelJobConfig, dry_run: bool, given: Collection[str] = ()) -> dict[str, Any]:
    """Metrics of `evaluate.model` on data.val, with the settings of the model except for the fields that are given."""
    saved = open_model(config)
    config = as_saved(config, saved, given)
    val, task = open_held_out(config, saved), make_task(config)
    settings = task.saved_settings().items()
    shown = ", ".join(f"{section}.{name}={value}" for section, fields in settings for name, value in fields.items())
    print(f"{task.name} of {config.evaluate.model} on {len(val)} images from {val.location}: {shown}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, f"evaluate-{task.name}") as job:
        report = evaluate_model(config, saved, val, job.run, job.state.folder)
    rows = {
        **{name: f"{value:.3f}" for name, value in report.metrics.items()},
        "tables, pictures": str(job.state.folder / "evaluation"),
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}",
    }
    print(f"done\n{table(rows)}")
    return {**report.metrics, "mlflow_run_id": job.run.run_id}


def evaluate_results(config: CocoResultsJobConfig, dry_run: bool) -> dict[str, Any]:
    """The twelve COCO metrics of `evaluate.results`, scored against `evaluate.annotations`."""
    given = config.evaluate
    if not given.annotations or not given.results:
        raise UserError("coco-results needs annotations=<COCO JSON> and results=<detections in COCO's results format>")
    if dry_run:
        return {"dry_run": True}
    scores = evaluate_files(Path(given.annotations), Path(given.results))
    rows = [
        {"number": number, **{kind: f"{score.numbers[number]:.3f}" for kind, score in scores.items()}}
        for number in NUMBERS
    ]
    print(grid(rows))
    return {f"{kind}/{name}": value for kind, score in scores.items() for name, value in score.numbers.items()}
