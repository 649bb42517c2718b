"""The scripts for a GPU, on the CPU with tiny sizes: every step runs, and their lines of JSON are there."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.fakes import write_photos

STEPS = (
    "card",
    "tests",
    "extraction",
    "train",
    "train-compiled",
    "train-compiled-graphs",
    "latency",
    "sam",
    "jpeg",
    "extraction-nvjpeg",
)


@pytest.mark.slow
def test_every_step_runs_and_a_failing_one_stops_no_other(tmp_path):
    broken = tmp_path / "python"  # fails for one step
    broken.write_text(f'#!/bin/sh\ncase "$1" in benchmarks/card.py) exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    command = ["benchmarks/on_a_gpu.sh", "cpu", str(tmp_path / "results.jsonl")]
    environment = {**os.environ, "PYTHON": str(broken), "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    *results, summary = lines
    assert summary["status"] == {name: 3 if name == "card" else 0 for name in STEPS}, ended.stdout
    assert {line["step"] for line in results} == set(STEPS) - {"card", "tests"}
    assert [line["lacks"] for line in results if "lacks" in line] == [["unknown"]]
    train = {line["step"]: line for line in results if line["step"].startswith("train")}
    assert [train[name]["compile"] for name in STEPS[3:6]] == [False, True, True]
    assert json.loads(ended.stdout.splitlines()[-1]) == summary


@pytest.mark.slow
def test_arms_for_which_the_time_suffices_are_compared(tmp_path, shared_data):
    for split, count in (("train", 70), ("val", 12)):
        write_photos(tmp_path / "photos" / split, count, seed=count)
    weights = [str(path) for path in sorted((shared_data / "weights").glob("*.safetensors"))]
    environment = {**os.environ, "PYTHON": sys.executable, "SIZE": "32", "STEPS": "4", "WORK": str(tmp_path / "work")}
    command = ["benchmarks/imagenette_on_a_gpu.sh", str(tmp_path / "photos"), *weights, "all", "angle"]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert figures.keys() == {"all", "angle"}, ended.stdout
    assert figures["all"].keys() == {"seeds", "knn", "linear"}
