"""Distil teachers into a student: fill the cache with what is missing, then train from it.

python jobs/distill.py                                             generated scenes, on this machine
python jobs/distill.py recipes/quickstart.yaml train.epochs=5 student.name=regla_s
python jobs/distill.py recipes/quickstart.yaml --plan              bytes and hours of cache and training
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import Mode, grid, later, percent, run, table
from pipeline.distill.config import DistillJobConfig


def add_modes(_: argparse.ArgumentParser, modes: Any) -> Callable[[argparse.Namespace], Mode | None]:
    """Add the flag for a plan with costs; see :data:`jobs._cli.AddModes`."""
    modes.add_argument(
        "--plan", action="store_true", help="probe teachers and student; print bytes and hours, and stop"
    )
    return lambda options: later("jobs.distill", "show_plan") if options.plan else None


if __name__ == "__main__":
    run(DistillJobConfig, later("jobs.distill"), __doc__, add_modes=add_modes)
    sys.exit()

from jobs._plan import cache_plan, fill, print_costs, print_plan, span, sum_known
from pipeline.cache.fill.decoders import check_decoder
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.plan import CachePlan, check_weights
from pipeline.distill.estimate import TrainingEstimate, estimate_training, time_on_cluster, time_student
from pipeline.distill.phases import Phase, plan_phases
from pipeline.distill.plan import check_session, training_plan
from pipeline.distill.sam_decoders import check_decoders
from pipeline.runs.folder import cache_store
from pipeline.runs.usage import loading_lines
from pipeline.runtime.ray_session import connect, hardware, is_cluster
from pipeline.runtime.units import size


def main(config: DistillJobConfig, dry_run: bool) -> dict[str, Any]:
    """Run the whole pipeline; an interrupted run of the same configuration resumes where it stopped."""
    started = time.perf_counter()
    phases = planned_phases(config)
    check_weights(*(plan for _, plan in _caches(phases)))
    for phase in phases:
        check_decoders(phase.plan.teachers)
    if dry_run:
        return {"dry_run": True}
    check_space(*(plan for _, plan in _caches(phases)))
    # MLflow takes seconds to import, which a dry run need not wait for.
    from pipeline.cache.fill.job import cache_bytes, image_bytes
    from pipeline.distill.job import distill
    from pipeline.distill.report import Filled, distill_report
    from pipeline.runs.session import open_job

    with open_job(config, "distill") as job:
        if not job.state.resumed:
            for phase in phases:
                check_session(phase)
        for phase in phases:
            check_decoder("train.decoder", phase.config.train.decoder)
        plans, reports = zip(*fill(job, _caches(phases)), strict=True)
        ready = iter(plans)
        filled = [phase.filled(ready) for phase in phases]
        computed = sum(report.shards_computed for report in reports)
        print(f"{computed} shards computed in {sum(report.seconds for report in reports):.0f} s", flush=True)
        with job.child_run("distill") as tracked:
            result = distill(filled, tracked, job.state.folder)
        figures = {
            "knn_before": result.knn_before,
            "knn_after": result.knn_after,
            **{f"teacher_knn/{name}": score for name, score in result.teacher_knn.items()},
            "shards_computed": computed,
            "cache_bytes": cache_bytes(*plans),
            "seconds": round(time.perf_counter() - started, 1),
        }
        job.run.log_metric_dict({name: float(value) for name, value in figures.items() if value is not None})
        registered = job.register(
            "student",
            result.model_uri,
            metric="knn_after",
            score=result.knn_after,
            held_out=result.held_out,
            lineage=result.lineage,
        )
        report = job.report(lambda: distill_report(job, config, result, Filled(plans, reports), figures))
    bad = {
        (split, sample["sample_id"])
        for report in reports
        for split, samples in report.quarantined.items()
        for sample in samples
    }
    rows = {
        **{f"kNN of {name}": percent(score) for name, score in result.teacher_knn.items()},
        "kNN of the student before": percent(result.knn_before),
        "kNN of the student after": percent(result.knn_after),
        "images seen": f"{result.samples} in {result.steps} steps",
        "shards computed": computed,
        "quarantined images": len(bad),
        "cache": f"{plans[0].store.uri} ({size(cache_bytes(*plans))} of features, {size(image_bytes(*plans))} of images)",
        "student": str(result.student),
        "report": report,
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}, model {registered or result.model_uri}",
        "time": f"{figures['seconds']:.0f} s",
    }
    print(f"done\n{table(rows)}\nload it\n{table(loading_lines(result.student))}")
    uris = {"model_uri": result.model_uri, "registered": registered}
    return {**figures, "student": str(result.student), **uris, "mlflow_run_id": job.run.run_id}


def planned_phases(config: DistillJobConfig) -> tuple[Phase, ...]:
    """Plan every phase, and print the plans."""
    phases = plan_phases(config, cache_store(config))
    for number, phase in enumerate(phases, 1):
        first, *others = phase.caches
        further = [f"cache for {part.student.input_size} px\n{cache_plan(plan, part)}" for part, plan in others]
        print_plan(*first, number, len(phases), *further, table(training_plan(phase)))
    return phases


def _caches(phases: Sequence[Phase]) -> list[tuple[DistillJobConfig, CachePlan]]:
    """The caches that the phases read."""
    return [cache for phase in phases for cache in phase.caches]


def show_plan(config: DistillJobConfig, _: argparse.Namespace) -> dict[str, Any]:
    """Probe teachers and student, and print what cache and training cost; raise an error if the cache cannot fit."""
    with connect() if is_cluster() else nullcontext():
        cluster, phases = hardware() if is_cluster() else None, planned_phases(config)
        figures = print_costs(_caches(phases), cluster)
        timer = time_on_cluster if cluster and cluster.gpus else time_student
        workers = [phase.config.train.most_workers or (cluster.gpus if cluster else 0) or 1 for phase in phases]
        trained = [estimate_training(phase, timer) for phase in phases]
    hours = [found.hours(count) for found, count in zip(trained, workers, strict=True)]
    rows = [_training_row(*row) for row in zip(range(1, len(phases) + 1), trained, workers, hours, strict=True)]
    print(f"training (forward and backward of the student alone)\n{grid(rows)}", flush=True)
    return {**figures, "training_hours": sum_known(hours)}


def _training_row(number: int, found: TrainingEstimate, workers: int, hours: float | None) -> dict[str, str]:
    return {
        "phase": str(number),
        "images": "unknown" if found.images is None else str(found.images),
        "measured": f"{found.images_per_second:.1f} images/s on {found.device}",
        "workers": str(workers),
        "time": span(hours),
    }
