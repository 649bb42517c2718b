"""The configuration class of each job, by the tag `job` of its MLflow runs; classes are imported on demand."""

import pkgutil
from functools import cache

from pipeline.config.tree import JobRoot

JOBS = {
    "precompute": "pipeline.cache.config:PrecomputeJobConfig",
    "distill": "pipeline.distill.config:DistillJobConfig",
    "finetune": "pipeline.downstream.config:FinetuneJobConfig",
    **dict.fromkeys(("knn", "linear", "seg-probe"), "pipeline.evaluate.config:EvaluateJobConfig"),
    **dict.fromkeys(("zero-shot", "retrieval"), "pipeline.voices.config:WordsJobConfig"),
    "correspondence": "pipeline.voices.config:CorrespondenceJobConfig",
    "promptable": "pipeline.voices.config:PromptsJobConfig",
    "evaluate": "pipeline.downstream.config:EvaluateModelJobConfig",  # evaluate-<task> in the tag
    "coco-results": "pipeline.downstream.config:CocoResultsJobConfig",
    "benchmark": "pipeline.benchmark.config:BenchmarkJobConfig",
}


def job_root(job: str) -> type[JobRoot] | None:
    """The root class of a job; None if the job takes no recipe."""
    address = JOBS.get(job) or JOBS.get(job.partition("-")[0])
    return pkgutil.resolve_name(address) if address else None


@cache
def all_roots() -> tuple[type[JobRoot], ...]:
    """The root classes of all jobs."""
    return tuple(pkgutil.resolve_name(address) for address in dict.fromkeys(JOBS.values()))
