"""Evaluate a backbone or a fine-tuned model. Name the evaluation first; --help after its name lists its fields alone:

python jobs/evaluate.py knn       evaluate.student=work/runs/<run>/student data.train=photos/train data.val=photos/val
python jobs/evaluate.py linear    evaluate.student=models:/m-... data.train=imagenet/train data.val=imagenet/val
python jobs/evaluate.py seg-probe evaluate.student=timm/<name> evaluate.weights=<file> evaluate.input_size=512
                                  data.train=ade20k/images/training data.val=ade20k/images/validation
python jobs/evaluate.py zero-shot evaluate.student=work/runs/<run>/student data.val=imagenet/val words.classes=imagenet
python jobs/evaluate.py retrieval evaluate.student=work/runs/<run>/student data.val=coco/val2017
                                  words.captions=coco/annotations/captions_val2017.json
python jobs/evaluate.py correspondence correspondence.student=work/runs/<run>/student correspondence.pairs=SPair-71k
python jobs/evaluate.py promptable evaluate.student=work/runs/<run>/student data.val=coco/val2017
                                   prompts.annotations=coco/annotations/instances_val2017.json prompts.sam=sam_vit_b_01ec64.pth
python jobs/evaluate.py classify|segment|detect evaluate.model=work/runs/<run>/model data.val=photos/val
python jobs/evaluate.py package.module:Class evaluate.model=work/runs/<run>/model data.val=photos/val
python jobs/evaluate.py coco-results annotations=instances_val2017.json results=detections.json
"""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import DEFAULT_RECIPE, RECIPES, complete, grid, later, percent, run, table
from pipeline.downstream.config import TASKS, CocoResultsJobConfig, EvaluateModelJobConfig
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.runs.config import JobConfig
from pipeline.voices.config import CorrespondenceJobConfig, PromptsJobConfig, WordsJobConfig

ROOTS: dict[str, type[JobConfig]] = {
    **dict.fromkeys(("knn", "linear", "seg-probe"), EvaluateJobConfig),
    **dict.fromkeys(("zero-shot", "retrieval"), WordsJobConfig),
    "correspondence": CorrespondenceJobConfig,
    "promptable": PromptsJobConfig,
    **{task: EvaluateModelJobConfig.of_task(task) for task in TASKS},
    "coco-results": CocoResultsJobConfig,
}
"""The configuration of each evaluation, by name. A user's own task has `EvaluateModelJobConfig`."""


def start(arguments: Sequence[str]) -> None:
    """Run the evaluation named first on the command line."""
    name, *others = arguments or [""]
    listed: Sequence[type[JobConfig]] = ()
    if name in ("-h", "--help"):
        name, others, listed = "knn", ["--help"], [*ROOTS.values()]
    if name not in ROOTS and ":" not in name:
        parser = argparse.ArgumentParser()
        parser.add_argument("evaluation", choices=ROOTS)
        complete(parser)
        known = ", ".join(ROOTS)
        print(f"error: name the evaluation first: {known}, as in `jobs/evaluate.py knn ...`", file=sys.stderr)
        sys.exit(2)
    body = partial(later("jobs.evaluate", "named"), name, {argument.partition("=")[0] for argument in others})
    short = ("annotations=", "results=") if name == "coco-results" else ()
    items = [f"evaluate.{argument}" if argument.startswith(short) else argument for argument in others]
    if name in TASKS or ":" in name:
        items.append(f"finetune.task={name}")
    recipe = RECIPES / f"{name}.yaml" if name in TASKS else DEFAULT_RECIPE  # promptable.yaml is of a distillation
    run(ROOTS.get(name, EvaluateModelJobConfig), body, __doc__ or "", items, recipe=recipe, listed=listed)


if __name__ == "__main__":
    start(sys.argv[1:])
    sys.exit()

from jobs._correspondences import correspondence
from jobs._prompts import promptable
from jobs._words import retrieval, zero_shot
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.job import log_images
from pipeline.downstream.base import make_task
from pipeline.downstream.detect.coco_eval import NUMBERS, in_words, read_files, score
from pipeline.downstream.job import as_saved, evaluate_model, open_held_out, open_model
from pipeline.errors import UserError
from pipeline.evaluate import job as evaluation
from pipeline.evaluate.job import FrozenPlan, SplitMaps, compute_features, plan_frozen
from pipeline.runs.session import open_job
from pipeline.runtime.units import size
from pipeline.tracking.run import Run

Measurement = Callable[[FrozenPlan, EvaluateJobConfig, Run, Path], dict[str, float]]


def knn(config: EvaluateJobConfig, dry_run: bool) -> dict[str, Any]:
    """kNN accuracy of frozen vectors on data.val, with all of data.train as the bank."""
    return evaluate(config, dry_run, "knn", plan_frozen(config), evaluation.knn)


def linear(config: EvaluateJobConfig, dry_run: bool) -> dict[str, Any]:
    """Accuracy of linear classifiers on frozen vectors."""
    return evaluate(config, dry_run, "linear", plan_frozen(config), evaluation.linear)


def seg_probe(config: EvaluateJobConfig, dry_run: bool) -> dict[str, Any]:
    """mIoU of 1x1 convolutions on frozen maps."""
    plan = plan_frozen(config, config.evaluate.grid or 0)
    measure = partial(evaluation.seg_probe, maps=SplitMaps.of(plan))
    return evaluate(config, dry_run, "seg-probe", plan, measure)


def evaluate(
    config: EvaluateJobConfig, dry_run: bool, name: str, plan: FrozenPlan, measure: Measurement
) -> dict[str, Any]:
    """Compute the missing features, measure and log; an interrupted job resumes where it stopped."""
    encoder, student = plan.encoder, config.evaluate.student
    spec, count = encoder.spec, plan.train.count + plan.val.count
    print(
        f"{name} of {student} at {spec.input_size[0]} px on {plan.val.location}: features of "
        f"{spec.grid[0]}x{spec.grid[1]}x{spec.patch_dim} {encoder.codec} per image, {size(count * encoder.row_bytes())} in the "
        "cache, computed once and without augmentation",
        flush=True,
    )
    for split in plan.cache.splits:
        if split.left_out:
            print(f"data.{split.split} left out: {'; '.join(split.left_out)}", flush=True)
    if dry_run:
        return {"dry_run": True}
    check_space(plan.cache)
    with open_job(config, name) as job:
        log_images(plan.cache, job.run)
        plan = compute_features(plan, config)
        job.run.set_tags({"student": str(student), "encoder": encoder.id})
        job.run.set_student_run(plan.student_run)
        figures = measure(plan, config, job.run, job.state.folder)
        job.run.log_metric_dict(figures)
    shown = {key: f"{value:g}" if key == "lr" else percent(value) for key, value in figures.items()}
    print(f"done\n{table({**shown, 'MLflow': f'{job.tracking_uri} run {job.run.run_id}'})}")
    return {**figures, "mlflow_run_id": job.run.run_id}


def evaluate_saved(config: EvaluateModelJobConfig, dry_run: bool, given: Collection[str] = ()) -> dict[str, Any]:
    """Metrics of `evaluate.model` on data.val, with the settings of the model except for the fields that are given."""
    saved = open_model(config)
    config = as_saved(config, saved, given)
    val, task = open_held_out(config, saved), make_task(config)
    settings = task.saved_settings().items()
    shown = ", ".join(f"{section}.{name}={value}" for section, fields in settings for name, value in fields.items())
    print(f"{task.name} of {config.evaluate.model} on {len(val)} images from {val.location}: {shown}", flush=True)
    for note in val.check():
        print(f"  note: {note}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, f"evaluate-{task.name}") as job:
        report = evaluate_model(config, saved, val, job.run, job.state.folder)
    rows = {
        **{name: task.in_words(name, value) for name, value in report.metrics.items()},
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
    dataset, detections = read_files(given.annotations, given.results)
    counts = f"{len(dataset['annotations'])} annotations of {len(dataset['images'])} images"
    print(f"coco-results of {len(detections)} detections from {given.results} on {counts}", flush=True)
    if dry_run:
        return {"dry_run": True}
    scores = score(dataset, detections)
    rows = [
        {"number": number, **{kind: in_words(number, found.numbers[number]) for kind, found in scores.items()}}
        for number in NUMBERS
    ]
    print(grid(rows))
    return {f"{kind}/{name}": value for kind, found in scores.items() for name, value in found.numbers.items()}


EVALUATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "knn": knn,
    "linear": linear,
    "seg-probe": seg_probe,
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "correspondence": correspondence,
    "promptable": promptable,
    "coco-results": evaluate_results,
}
"""The evaluations other than those of downstream tasks."""


def named(name: str, given: Collection[str], config: Any, dry_run: bool) -> dict[str, Any]:
    """Run an evaluation; that of a task also looks at which fields the command line has given."""
    if name in EVALUATIONS:
        return EVALUATIONS[name](config, dry_run)
    return evaluate_saved(config, dry_run, given)
