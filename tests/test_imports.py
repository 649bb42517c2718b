"""What machines without Ray and MLflow, such as a bare GPU host, must be able to import."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

ABSENT = "import sys; sys.modules |= dict.fromkeys(('ray', 'mlflow')); "


@pytest.mark.parametrize(
    "modules",
    [
        "teachers.clip, teachers.dinov2, teachers.hog, teachers.registry, teachers.sam",
        "pipeline.cache.layout.codec, pipeline.cache.fill.extract, pipeline.cache.read.reader_process, pipeline.student.loading",
        "pipeline.distill.task, pipeline.distill.kept_heads, pipeline.distill.phases, pipeline.training",
        "benchmarks.cache_read, benchmarks.cache_size, benchmarks.extraction, benchmarks.train_step, jobs.benchmark",
        "benchmarks.folder_scale, benchmarks.index_scale, benchmarks.shared_cores, benchmarks.startup",
        "benchmarks.card, benchmarks.floor, benchmarks.jpeg_decode, benchmarks.latency, benchmarks.sam_attention",
        "benchmarks.proof, benchmarks.segmentation_probe",
    ],
)
def test_ray_and_mlflow_are_imported_where_they_are_used(modules):
    ended = subprocess.run(
        [sys.executable, "-c", f"{ABSENT}import {modules}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_controller_of_ray_train_imports_little():
    """What is pickled for it names these modules."""
    modules = "pipeline.training.entry, pipeline.training.checkpoint, pipeline.tracking.run_log"
    modules += ", pipeline.distill.commits, pipeline.downstream.commits"
    assert _imported(modules, "{'mlflow', 'timm', 'torch', 'torchvision'}") == []


@pytest.mark.parametrize(
    "modules",
    [
        "jobs.distill, pipeline.distill.job, pipeline.distill.report, pipeline.runs.session",
        "jobs.finetune, pipeline.downstream.job, pipeline.downstream.report, pipeline.runs.session",
    ],
)
def test_a_job_that_has_yet_to_train_has_not_imported_what_its_results_need(modules):
    """The worker's memory is at its peak while the job waits; Triton comes with torch's counter of operations."""
    assert _imported(modules, "{'matplotlib', 'ray.data', 'sympy', 'torch._dynamo', 'triton'}") == []


def _imported(modules, heavy):
    """Those of `heavy` that come with these modules."""
    code = f"import sys, {modules}; print(*sorted({heavy} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return ended.stdout.split()
