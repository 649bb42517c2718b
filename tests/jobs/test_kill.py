"""`kill -9` in the middle of extraction, then in the middle of training: the same command does what is left, once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import distill
from tests.fakes import SMALL_JOB, colours_entry, images_seen
from tests.report.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DELAY = 0.7
TEACHER = "cache/parts/*/views/full/teachers/*"


@pytest.fixture
def job_folder(tmp_path):
    """Work folder of the killed job."""
    return tmp_path / "work"


@pytest.fixture
def arguments(tmp_path, job_folder):
    teacher = colours_entry(tmp_path / "calls", delay=DELAY)
    # A projection would be fitted on all of these few images before the first shard is committed.
    return [
        *SMALL_JOB,
        "train.epochs=8",
        "cache.batch_size=48",
        "cache.codec=int8",
        f"work={job_folder}",
        f"teachers=[{teacher}]",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_a_killed_job_committed_is_not_done_again(tmp_path, arguments, job_folder, job):
    calls = tmp_path / "calls"
    kill_when("distill.py", arguments, lambda: list(job_folder.glob(f"{TEACHER}/shard-*.json")), tmp_path)
    _wait_until_still(calls)
    # The statistics of a shard become those of its part, once that is complete.
    committed = {path for path in job_folder.glob(f"{TEACHER}/shard-*") if path.suffix != ".npz"}
    left = 4 - len([path for path in committed if path.suffix == ".json"])
    assert 0 < left < 4
    times = {path: path.stat().st_mtime_ns for path in committed}
    seen = images_seen(calls)

    kill_when("distill.py", arguments, lambda: list(job_folder.glob("runs/*/train/checkpoint-0001-*")), tmp_path)
    _wait_until_still(calls)
    assert images_seen(calls) - seen == 48 * left
    assert {path: path.stat().st_mtime_ns for path in committed} == times
    (run,) = (job_folder / "runs").iterdir()
    known = json.loads((run / "run.json").read_text())["mlflow"]
    assert not (run / "student").exists()

    text, figures = job(distill.main, *arguments)
    assert "resuming the unfinished run" in text
    assert "0 shards computed" in text
    assert "train epoch 1/" not in text
    assert images_seen(calls) - seen == 48 * left
    assert figures["mlflow_run_id"] == known["job"]
    page = Page((run / "report.html").read_text())
    page.check()
    _check_curves(MlflowClient(f"sqlite:///{job_folder}/mlflow.db"), known, page.points("averaged weights"))


def _check_curves(client, known, drawn):
    for run in known.values():
        assert client.get_run(run).info.status == "FINISHED"
    for run in (known["distill"], known["job"]):
        history = {name: client.get_metric_history(run, name) for name in ("loss", "knn", "samples_seen")}
        assert [point.step for point in history["loss"]] == list(range(1, 49))
        assert [point.step for point in history["knn"]] == list(range(0, 49, 6))
        assert [point.value for point in history["samples_seen"]] == list(range(24, 1153, 24))
        assert drawn == [(epoch, point.value) for epoch, point in enumerate(history["knn"])]


@pytest.mark.slow
def test_ctrl_c_in_training_says_so_and_the_same_command_resumes(tmp_path, arguments, job_folder, job):
    arguments = [*arguments, "teachers=[hog]"]
    code, output = kill_when(
        "distill.py",
        arguments,
        lambda: list(job_folder.glob("runs/*/train/checkpoint-0001-*")),
        tmp_path,
        signal.SIGINT,
    )
    assert code == 130
    assert output.splitlines()[-1] == "interrupted; the same command resumes here"
    assert "Traceback" not in output
    (run,) = (job_folder / "runs").iterdir()
    known = json.loads((run / "run.json").read_text())["mlflow"]
    client = MlflowClient(f"sqlite:///{job_folder}/mlflow.db")
    assert client.get_run(known["job"]).info.status == "KILLED"
    assert "resuming the unfinished run" in job(distill.main, *arguments)[0]


def kill_when(name, arguments, reached, folder, number=signal.SIGKILL):
    """Start a job of `jobs/` in a process of its own, in this folder, and send a signal once `reached()`; its code and output."""
    job = [sys.executable, REPOSITORY / "jobs" / name, *arguments]
    with subprocess.Popen(
        job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
        cwd=folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background ignores it
    ) as process:
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        return process.wait(120), process.stdout.read()


def _wait_until_still(calls):
    """Ray's own processes outlive their driver by seconds."""
    before = -1
    while before != images_seen(calls):
        before = images_seen(calls)
        time.sleep(5 * DELAY)
