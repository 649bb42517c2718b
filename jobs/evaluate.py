"""Evaluate a student or a fine-tuned model without training anything.

python jobs/evaluate.py knn evaluate.student=work/runs/<run>/student data.train=photos/train data.val=photos/val
python jobs/evaluate.py classify|segment|detect evaluate.model=work/runs/<run>/model data.val=photos/val
python jobs/evaluate.py coco-results annotations=instances_val2017.json results=detections.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

from jobs._cli import DEFAULT_RECIPE, RECIPES, percent, run, table
from jobs._downstream import DOWNSTREAM_EVALUATIONS, long_name
from pipeline.cache.build import build_cache, plan_cache
from pipeline.cache.estimate import check_space
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluate.knn import check_classes, student_knn
from pipeline.job import open_job
from pipeline.runs import cache_store, work_folder
from pipeline.student.model import load_encoder
from pipeline.tracking import load_student, resolve_uri


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


EVALUATIONS = {"knn": main, **DOWNSTREAM_EVALUATIONS}


def start(arguments: Sequence[str]) -> None:
    """Run the evaluation that the command line names first."""
    named = [argument for argument in arguments if argument in EVALUATIONS]
    if len(named) != 1 and not {"-h", "--help"} & set(arguments):
        known = ", ".join(EVALUATIONS)
        print(f"error: name one evaluation first: {known}, as in `jobs/evaluate.py knn ...`", file=sys.stderr)
        sys.exit(2)
    name = named[0] if named else "knn"
    own = RECIPES / f"{name}.yaml"
    others = [long_name(name, argument) for argument in arguments if argument != name]
    run(EVALUATIONS[name], __doc__ or "", others, recipe=own if own.exists() else DEFAULT_RECIPE)


if __name__ == "__main__":
    start(sys.argv[1:])
