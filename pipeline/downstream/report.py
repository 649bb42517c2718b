"""The report of a fine-tuning: data, curves, what the model does on held-out images, cost, and how to use it."""

import csv
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pipeline.downstream.base import DownstreamTask, make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.job import FinetunePlan, FinetuneResult
from pipeline.report.chart import Chart, Line
from pipeline.report.curves import Curves, by_epoch, read_curves
from pipeline.report.pictures import Picture, picture
from pipeline.report.report import Card, Report, Section
from pipeline.runs.session import Job
from pipeline.runtime.ray_session import IS_INSTALLED, devices
from pipeline.runtime.units import counted, time_span

PICTURES, SIDE = 12, 960
"""Held-out images that are shown with their predictions, and their longest side in pixels."""


def finetune_report(
    job: Job, config: FinetuneJobConfig, plan: FinetunePlan, result: FinetuneResult, seconds: float
) -> Report:
    """The report of a finished fine-tuning that took `seconds` since its last start."""
    task, folder = make_task(config), job.state.folder
    curves = read_curves(folder / "metrics.jsonl")
    sections = (
        Section("Recipe", facts=_recipe(config, plan), folded={"All fields": _yaml(config)}),
        Section("Data", table=_data(plan), facts={"notes": "; ".join(plan.notes)} if plan.notes else {}),
        Section("Curves", charts=tuple(_charts(curves, task, result))),
        Section("On held-out images", examples=tuple(_pictures(folder / "evaluation"))),
        Section("By class", table=_per_class(folder / "evaluation/per_class.csv")),
        Section("Cost", facts=_cost(job, seconds)),
        Section("Load the model", facts={"model in MLflow": result.model_uri}, code=_lines(result.model)),
    )
    run = f"run {job.run.run_id} in {job.tracking_uri} · {folder}"
    cards = tuple(_cards(task, plan, result, seconds))
    return Report(config.title(job.name), "fine-tuning", run, cards, tuple(filter(_holds_something, sections)))


def _holds_something(section: Section) -> bool:
    return any((section.facts, section.table, section.charts, section.examples, section.code))


def _cards(task: DownstreamTask[Any], plan: FinetunePlan, result: FinetuneResult, seconds: float) -> Iterator[Card]:
    if (name := task.headline) in result.after:
        before, after = (task.in_words(name, values[name]) for values in (result.before, result.after))
        held_out = f" on {len(plan.val)} held-out images" if plan.val else ""
        yield Card(name, after, f"{before} before{held_out}")
    yield Card("images seen", counted(result.samples), f"in {result.steps} steps")
    yield Card("time", time_span(seconds), "of the last start")


def _recipe(config: FinetuneJobConfig, plan: FinetunePlan) -> dict[str, str]:
    teacher = {"soft targets": plan.teacher.summary} if plan.teacher else {}
    return {
        "task": config.finetune.task,
        "backbone": f"{plan.start.name} from {config.finetune.student or 'scratch'}",
        **({"frozen": "the backbone is not trained"} if config.finetune.frozen else {}),
        **(
            {"rate of the backbone": f"{factor:g} of the learning rate"}
            if (factor := config.finetune.backbone_lr) != 1
            else {}
        ),
        **teacher,
        "training": f"{config.train.epochs} epochs, {config.train.batch_size} images per step, seed {config.seed}",
        "learning rate": config.train.lr_rule,
    }


def _yaml(config: FinetuneJobConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _data(plan: FinetunePlan) -> tuple[tuple[str, ...], ...]:
    used = {"training": plan.train, **({"held out": plan.val} if plan.val else {})}
    rows = [(split, str(len(data)), str(len(data.classes)), data.location) for split, data in used.items()]
    return ("", "images", "classes", "location"), *rows


def _charts(curves: Curves, task: DownstreamTask[Any], result: FinetuneResult) -> Iterator[Chart]:
    for title, names in task.charts(result.after).items():
        points = {name: found for name in names if (found := by_epoch(curves, name))}
        lines = tuple(Line(name, line, last=task.in_words(name, line[-1][1])) for name, line in points.items())
        if lines:
            yield Chart(f"{title} on held-out images", "epoch", title, lines)
    if loss := by_epoch(curves, "loss"):
        yield Chart("Training loss", "epoch", "loss", (Line("total", loss, last=f"{loss[-1][1]:.3g}"),))


def _pictures(folder: Path) -> Iterator[Picture]:
    files = sorted((folder / "pictures").glob("*.png"))[:PICTURES]
    named = {file: file.stem.partition("-")[2] for file in files}  # without the number
    for file, name in (named | {folder / "confusion.png": "confusion of the classes"}).items():
        if file.is_file():
            with Image.open(file) as image:
                yield picture(image.convert("RGB"), name, side=SIDE)


def _per_class(file: Path) -> tuple[tuple[str, ...], ...]:
    if not file.is_file():
        return ()
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    return tuple(header), *(tuple(map(_short, row)) for row in rows)


def _short(cell: str) -> str:
    try:
        return cell if cell.isdecimal() else f"{float(cell):.4g}"
    except ValueError:
        return cell


def _cost(job: Job, seconds: float) -> dict[str, str]:
    earlier = job.state.hours * 3600
    gpus, kind = devices()
    spent = job.state.gpu_hours + gpus * seconds / 3600
    return {
        "device": kind,
        "time of this start": time_span(seconds),
        **({"time of earlier starts": time_span(earlier)} if earlier else {}),
        **({"GPU hours": f"{spent:.3g}"} if spent else {}),
    }


def _lines(model: Path) -> Mapping[str, str]:
    job = "regla predict" if IS_INSTALLED else "python jobs/predict.py"
    return {
        "in Python": f"from regla import load_predictor; model = load_predictor({str(model)!r})",
        "on images": f"{job} {shlex.quote(str(model))} <images>",
    }
