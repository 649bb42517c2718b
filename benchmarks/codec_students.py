"""Compare students that are distilled from features stored in different codecs, with equal data and seeds.

    python benchmarks/codec_students.py recipes/photos.yaml data.train=train.parquet data.val=test.parquet data.name=cifar \
        teachers.1.weights=mobilenetv2.safetensors train.epochs=4 --seeds 0 1 2

Runs of one seed start with equal weights and see the same images in the same order: only the targets differ. Ray fills the
cache; training runs in this process. Finished runs are kept in `--results` and not repeated. Prints a table of kNN on the
held-out images after the last epoch, and one line of JSON: `difference` to the first codec in points, averaged over the seeds,
and its standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

from benchmarks.results import measure_once
from pipeline.cache.fill.build import CachePlan, build_cache, plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.task import DistillJob, DistillTask
from pipeline.runs.folder import cache_store
from pipeline.runtime.ray_session import connect
from pipeline.training.checkpoint import Snapshot
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.task import Task
from pipeline.training.worker import Worker


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what the results file lacks, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="+", help="a recipe and overrides, as for the jobs")
    parser.add_argument("--codecs", nargs="+", default=["float32", "pca-int8-zstd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("work/codec_students.jsonl"), help="where runs are kept")
    options = parser.parse_args(arguments)
    recipe, *overrides = options.items
    knn: dict[str, list[float]] = {codec: [] for codec in options.codecs}
    for seed in options.seeds:
        for codec in options.codecs:
            knn[codec].append(_run(recipe, [*overrides, f"cache.codec={codec}", f"seed={seed}"], options.results))
    print(json.dumps(_report(knn)))


def _run(recipe: str, overrides: Sequence[str], results: Path) -> float:
    """The student's kNN in percent."""
    key = " ".join([recipe, *overrides])

    def measure() -> dict[str, float]:
        started = time.perf_counter()
        knn = _distil(load_config(DistillJobConfig, recipe, overrides))
        print(f"{key}  kNN {knn:.2f} %  {time.perf_counter() - started:.0f} s", flush=True)
        return {"knn": knn}

    return float(measure_once(results, {"run": key}, measure)["knn"])


def plan_of(config: DistillJobConfig) -> CachePlan:
    """Plan of a complete cache; Ray computes missing features."""
    plan = plan_cache(config, cache_store(config))
    if any(split.missing(teacher) for split in plan.splits for teacher in plan.teachers):
        with connect():
            plan, _ = build_cache(plan, config)
    return plan


def train_silently(task: Task, config: TrainConfig) -> nn.Module:
    """Train in this process without evaluations; returns the module with its averaged weights, in eval mode."""
    snapshots: list[Snapshot] = []
    train(task, config, Worker(), None, snapshots.append)
    state = snapshots[-1].state
    assert state is not None
    task.module.load_state_dict(state["ema"])
    return task.module.eval()


def make_task(config: DistillJobConfig, plan: CachePlan) -> EvaluatedAtEnd:
    """Distillation from a complete cache, from random weights."""
    if config.student.weights != "random":
        raise SystemExit("student.weights: this benchmark compares students from random weights")
    datasets = {split.split: split.dataset for split in plan.splits}
    return EvaluatedAtEnd(DistillJob(config, datasets["train"], datasets["val"], plan.teachers))


def _distil(config: DistillJobConfig) -> float:
    task = make_task(config, plan_of(config))
    return DistillTask.evaluate(task, train_silently(task, config.train), None)["knn"]


class EvaluatedAtEnd(DistillTask):
    """Distillation without kNN before and after each epoch."""

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Nothing."""
        return {}


def _report(knn: dict[str, list[float]]) -> dict[str, Any]:
    first, *others = knn
    print(f"{'codec':<16}{'kNN, %':>8}{'difference':>12}{'standard error':>16}  by seed")
    print(f"{first:<16}{mean(knn[first]):>8.2f}{'':>28}  {' '.join(f'{value:.2f}' for value in knn[first])}")
    figures: dict[str, Any] = {"seeds": len(knn[first]), first: round(mean(knn[first]), 2)}
    for codec in others:
        differences = [value - base for value, base in zip(knn[codec], knn[first], strict=True)]
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        by_seed = " ".join(f"{value:+.2f}" for value in differences)
        print(f"{codec:<16}{mean(knn[codec]):>8.2f}{mean(differences):>+12.2f}{error:>16.2f}  {by_seed}")
        figures[codec] = round(mean(knn[codec]), 2)
        figures |= {"difference": round(mean(differences), 3), "standard_error": round(error, 3)}
    return figures


if __name__ == "__main__":
    main()
