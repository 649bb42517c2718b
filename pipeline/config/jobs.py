"""Which configuration each job has, by the name that its MLflow runs carry in the tag `job`.

The classes stand beside the code that they configure, and are imported when they are asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from pipeline.config.tree import JobRoot

JOBS = {
    "precompute": "pipeline.cache.config:PrecomputeJobConfig",
    "distill": "pipeline.distill.config:DistillJobConfig",
    "finetune": "pipeline.downstream.config:FinetuneJobConfig",
    **dict.fromkeys(("knn", "linear", "seg-probe"), "pipeline.evaluate.config:EvaluateJobConfig"),
    "evaluate": "pipeline.downstream.config:EvaluateModelJobConfig",  # as evaluate-<task>
    "coco-results": "pipeline.downstream.config:CocoResultsJobConfig",
    "benchmark": "pipeline.benchmark.config:BenchmarkJobConfig",
}


def job_root(job: str) -> type[JobRoot] | None:
    """The root class of a job; None for one that has no recipe."""
    address = JOBS.get(job) or JOBS.get(job.partition("-")[0])
    return _import(address) if address else None


@cache
def all_roots() -> tuple[type[JobRoot], ...]:
    """The root classes of all jobs."""
    return tuple(_import(address) for address in dict.fromkeys(JOBS.values()))


def _import(address: str) -> type[JobRoot]:
    module, _, name = address.partition(":")
    root: type[JobRoot] = getattr(import_module(module), name)
    return root
