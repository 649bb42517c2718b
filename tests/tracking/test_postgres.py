"""A distillation that is tracked by an MLflow server on PostgreSQL, which is killed in the middle and started again."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.fakes import SMALL_JOB, colours_entry
from tests.tracking.postgres import PASSWORD, MlflowServer, postgres

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SECRET = "correct-horse-battery"
EPOCHS, STEPS = 5, 6


@pytest.fixture
def server(tmp_path):
    with postgres() as database:
        server = MlflowServer(database, tmp_path / "server")
        try:
            server.wait()
            yield server
        finally:
            server.kill()


@pytest.fixture
def ray_folder():
    """Ray's own files; the path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="rs"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_server_that_is_killed_during_training_misses_nothing_and_no_password_is_written(
    tmp_path, server, ray_folder
):
    work, output = tmp_path / "work", tmp_path / "output"
    arguments = [
        *SMALL_JOB,
        f"train.epochs={EPOCHS}",
        "train.keep_finished=1",  # or there is no checkpoint to refer to
        f"work={work}",
        f"teachers=[{colours_entry(tmp_path / 'calls')}]",
    ]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:{server.port}",
        "RAY_TMPDIR": str(ray_folder),
    }
    with (
        output.open("w") as log,
        subprocess.Popen(
            [sys.executable, REPOSITORY / "jobs/distill.py", *arguments],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=tmp_path,
        ) as job,
    ):
        _wait_for(work, "runs/*/train/checkpoint-0001-*", job, output)
        server.kill()
        _wait_for(work, f"runs/*/train/checkpoint-{EPOCHS:04d}-*", job, output)
        server.start()
        job.wait()
    text = output.read_text()
    assert job.returncode == 0, text

    _check_runs(MlflowClient(f"http://127.0.0.1:{server.port}"))
    assert not list(work.glob("runs/*/unsent/*/*"))
    for secret in (SECRET, PASSWORD):
        assert secret not in text
        for folder in (work, ray_folder, server.folder / "artifacts"):
            assert _files_with(secret, folder) == []


def _wait_for(work, pattern, job, output):
    while not list(work.glob(pattern)):
        assert job.poll() is None, output.read_text()
        time.sleep(0.05)


def _check_runs(client):
    (experiment,) = [e for e in client.search_experiments() if e.name == "regla-distill"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert [name.split()[0] for name in sorted(runs)] == ["distill", "precompute", "regla_t"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    distill = runs["distill"].info.run_id
    history = {name: client.get_metric_history(distill, name) for name in ("loss", "knn", "samples_seen")}
    assert sorted(point.step for point in history["loss"]) == list(range(1, EPOCHS * STEPS + 1))
    assert sorted(point.step for point in history["knn"]) == list(range(0, EPOCHS * STEPS + 1, STEPS))
    assert [point.value for point in sorted(history["samples_seen"], key=lambda point: point.step)] == [
        24 * step for step in range(1, EPOCHS * STEPS + 1)
    ]
    artifacts = {file.path for file in client.list_artifacts(distill, "student")}
    assert {"student/student.safetensors", "student/student.json"} <= artifacts
    assert [file.path for file in client.list_artifacts(distill, "checkpoint")] == ["checkpoint/reference.json"]


def _files_with(secret, folder):
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes()
    ]
