"""Distil teachers into a student: precompute what the cache lacks, then train from it.

python jobs/distill.py                                             generated sample scenes, on this machine
python jobs/distill.py recipes/quickstart.yaml train.epochs=5 student.name=regla_s
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import percent, run, size, table
from jobs._plan import cache_plan
from pipeline.cache.build import CachePlan, plan_cache
from pipeline.cache.estimate import check_space
from pipeline.cache.job import cache_bytes, precompute
from pipeline.config import Config
from pipeline.distill.job import distill, grid_rules, steps_per_epoch
from pipeline.job import open_job
from pipeline.runs import cache_store


def main(config: Config, dry_run: bool) -> dict[str, Any]:
    """Run the whole pipeline; an interrupted run of the same configuration goes on where it stopped."""
    started = time.perf_counter()
    plan = plan_cache(config, cache_store(config))
    print(f"plan\n{cache_plan(plan, config)}\n{training_plan(plan, config)}", flush=True)
    if dry_run:
        return {"dry_run": True}
    check_space(plan)
    with open_job(config, "distill") as job:
        if job.state.resumed:
            print(f"resuming the unfinished run in {job.state.folder}", flush=True)
        with job.phase("precompute") as tracked:
            plan, report = precompute(config, plan, tracked)
        print(f"{report.shards_computed} shards computed in {report.seconds:.0f} s", flush=True)
        with job.phase("distill") as tracked:
            result = distill(config, plan, tracked, job.state.folder)
        figures = {
            "knn_before": result.knn_before,
            "knn_after": result.knn_after,
            **{f"teacher_knn/{name}": score for name, score in result.teacher_knn.items()},
            "shards_computed": report.shards_computed,
            "cache_bytes": cache_bytes(plan),
            "seconds": round(time.perf_counter() - started, 1),
        }
        job.run.log_metric_dict({name: float(value) for name, value in figures.items() if value is not None})
    rows = {
        **{f"kNN of {name}": percent(score) for name, score in result.teacher_knn.items()},
        "kNN of the student before": percent(result.knn_before),
        "kNN of the student after": percent(result.knn_after),
        "images seen": f"{result.samples} in {result.steps} steps",
        "shards computed": report.shards_computed,
        "quarantined images": sum(len(bad) for bad in report.quarantined.values()),
        "cache": f"{plan.store.uri} ({size(cache_bytes(plan))})",
        "student": str(result.student),
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}, model {result.model_uri}",
        "time": f"{figures['seconds']:.0f} s",
    }
    print(f"done\n{table(rows)}")
    return {**figures, "model_uri": result.model_uri, "mlflow_run_id": job.run.run_id}


def training_plan(plan: CachePlan, config: Config) -> str:
    """Student, grid rules and steps."""
    steps = steps_per_epoch(config, plan)
    rows: dict[str, str | None] = {
        "student": f"{config.student.name} at {config.student.input_size} px",
        "training": f"{config.train.epochs} epochs of {steps} steps of {config.train.batch_size} images",
        "learning rate": config.train.lr_rule,
    }
    rows |= {f"grid {name}": rule for name, rule in grid_rules(config, plan).items()}
    return table(rows)


if __name__ == "__main__":
    run(main, __doc__)
