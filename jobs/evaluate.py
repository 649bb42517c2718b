"""Evaluate a student without training anything.

python jobs/evaluate.py knn evaluate.student=work/runs/<run>/student data.train=photos/train data.val=photos/val
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

from jobs._cli import percent, run, table
from pipeline.cache.build import build_cache, plan_cache
from pipeline.cache.estimate import check_space
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluate.knn import check_classes, student_knn
from pipeline.job import open_job
from pipeline.runs import cache_store, work_folder
from pipeline.student.model import load_encoder
from pipeline.tracking import load_student, resolve_uri

TASKS = ("knn",)


def main(config: Config, dry_run: bool) -> dict[str, Any]:
    """kNN accuracy of `evaluate.student` on data.val, at student.input_size, with data.train as the bank."""
    encoder = load(config)
    plan = plan_cache(config, cache_store(config), teachers=False)
    train, val = plan.split("train"), plan.split("val")
    if train is None or val is None:
        raise UserError("data.val: kNN needs held-out images")
    check_classes(train.dataset, val.dataset)
    print(f"kNN of {config.evaluate.student} at {config.student.input_size} px on {val.dataset.location}", flush=True)
    if dry_run:
        return {"dry_run": True}
    check_space(plan)
    with open_job(config, "evaluate") as job:
        build_cache(plan, config)
        knn = student_knn(encoder, train.dataset, val.dataset, config.student.input_size, config.knn)
        job.run.log_metric_dict({"knn": knn})
        job.run.set_tags({"student": str(config.evaluate.student)})
    print(f"done\n{table({'kNN': percent(knn), 'MLflow': f'{job.tracking_uri} run {job.run.run_id}'})}")
    return {"knn": knn, "mlflow_run_id": job.run.run_id}


def load(config: Config) -> nn.Module:
    """The student, from an exported folder or from MLflow."""
    student = config.evaluate.student
    if not student:
        raise UserError(
            "evaluate.student must be given: an MLflow model URI (models:/m-...) or an exported student folder"
        )
    if "://" in student or student.startswith(("models:/", "runs:/")):
        return load_student(student, resolve_uri(config.tracking.uri, work_folder(config)))
    return load_encoder(Path(student))


if __name__ == "__main__":
    if len(sys.argv) < 2 or (sys.argv[1] not in TASKS and sys.argv[1] not in ("-h", "--help")):
        print(
            f"error: name the evaluation first: {', '.join(TASKS)}, as in `jobs/evaluate.py knn ...`", file=sys.stderr
        )
        sys.exit(2)
    run(main, __doc__, [argument for argument in sys.argv[1:] if argument not in TASKS])
