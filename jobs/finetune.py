"""Fine-tune a backbone for classification, segmentation, detection, or your own task.

python jobs/finetune.py                                            classification of generated scenes, from scratch
python jobs/finetune.py recipes/segment.yaml finetune.student=work/runs/<run>/student
python jobs/finetune.py recipes/coco_detect.yaml finetune.student=models:/m-... data.train=coco/train2017
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import RECIPES, later, run, table
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.errors import UserError


def listed_configs(arguments: Sequence[str]) -> Sequence[type[FinetuneJobConfig]]:
    """Configurations whose fields `--help` lists: that of the user's own task, if one is named and can be imported."""
    own = [item for item in arguments if item.startswith("finetune.task=") and ":" in item]
    if not own or not {"-h", "--help"} & set(arguments):
        return ()
    try:
        return [FinetuneJobConfig.of_task(own[-1].partition("=")[2])]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    configs = listed_configs(sys.argv[1:])
    run(FinetuneJobConfig, later("jobs.finetune"), __doc__, recipe=RECIPES / "classify.yaml", listed=configs)
    sys.exit()

from pipeline.downstream.base import DownstreamTask, make_task
from pipeline.downstream.job import FinetunePlan, finetune, plan_finetune
from pipeline.downstream.report import finetune_report
from pipeline.runs.session import open_job


def main(config: FinetuneJobConfig, dry_run: bool) -> dict[str, Any]:
    """Train and evaluate; an interrupted run of the same configuration resumes."""
    started = time.perf_counter()
    plan = plan_finetune(config)
    config = plan.settled(config)
    task = make_task(config)
    print(f"plan\n{table(plan_rows(config, plan))}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, "finetune") as job:
        with job.child_run("finetune") as tracked:
            result = finetune(config, plan, tracked, job.state.folder)
        figures = {
            **{f"{name}_before": value for name, value in result.before.items()},
            **result.after,
            "seconds": round(time.perf_counter() - started, 1),
        }
        job.run.log_metric_dict(figures)
        registered = job.register(
            task.name,
            result.model_uri,
            metric=task.headline,
            score=task.score(result.after),
            held_out=result.held_out,
            lineage=result.lineage,
        )
        report = job.report(lambda: finetune_report(job, config, plan, result, float(figures["seconds"])))
    rows = {
        **{name: _before_after(task, name, result.before[name], value) for name, value in result.after.items()},
        "images seen": f"{result.samples} in {result.steps} steps",
        "model": str(result.model),
        "report": report,
        "tables, pictures": str(job.state.folder / "evaluation") if result.after else None,
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}, model {registered or result.model_uri}",
        "time": f"{figures['seconds']:.0f} s",
    }
    print(f"done\n{table(rows)}")
    uris = {"model_uri": result.model_uri, "registered": registered}
    return {**figures, "model": str(result.model), **uris, "mlflow_run_id": job.run.run_id}


def _before_after(task: DownstreamTask[Any], metric: str, before: float, after: float) -> str:
    shown = [task.in_words(metric, value) for value in (before, after)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} before, {shown[1]} after"


def plan_rows(config: FinetuneJobConfig, plan: FinetunePlan) -> dict[str, str | None]:
    """The plan, for people."""
    held_out = f"{len(plan.val)} from {plan.val.location}" if plan.val else "none: no metrics"
    frozen = ", frozen" if config.finetune.frozen else ""
    return {
        "task": config.finetune.task + (f", {len(classes)} classes" if (classes := plan.train.classes) else ""),
        "training images": f"{len(plan.train)} from {plan.train.location}",
        "held-out images": held_out,
        "backbone": f"{plan.start.name} from {config.finetune.student or 'scratch'}{frozen}",
        "soft targets": plan.teacher.summary if plan.teacher else None,
        "training": config.train.describe_epochs(len(plan.train), plan.steps),
        "notes": "; ".join(plan.notes) or None,
    }
