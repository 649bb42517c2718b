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
        "benchmarks.card, benchmarks.floor, benchmarks.jpeg_decode, benchmarks.latency, benchmarks.sam_attention",
    ],
)
def test_ray_and_mlflow_are_imported_where_they_are_used(modules):
    ended = subprocess.run(
        [sys.executable, "-c", f"{ABSENT}import {modules}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
