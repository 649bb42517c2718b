"""The main job on a cluster: `ray start --head`, then `jobs/submit.py`, for real."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from ray.job_submission import JobSubmissionClient

from tests.fakes import SMALL_JOB

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
pytestmark = pytest.mark.slow
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


@pytest.fixture(scope="module")
def dashboard():
    """Address of the job server of a cluster of one node, with ports of its own."""
    with tempfile.TemporaryDirectory(
        prefix="rh", ignore_cleanup_errors=True
    ) as folder:  # short: Ray puts sockets there
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        flags = [f"--{name}={port}" for name, port in ports.items()]
        command = [RAY, "start", "--head", "--block", *flags, "--num-cpus=4", "--object-store-memory=300000000"]
        path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # the job's `python` is this one
        environment = {**os.environ, "PATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "REGLA_LOG": "json"}
        head = subprocess.Popen(
            [*command, f"--temp-dir={folder}", "--disable-usage-stats"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        _wait_for(f"{address}/api/version")
        yield address
        os.killpg(head.pid, signal.SIGKILL)  # asked politely, it takes half a minute
        head.wait()


def _wait_for(url):
    deadline = time.monotonic() + 60
    while True:
        try:
            return urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _submit(dashboard, *arguments):
    """A submission of the main job that has begun."""
    job = [sys.executable, "jobs/submit.py", "jobs/distill.py", "recipes/quickstart.yaml", *arguments]
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": dashboard}
    return subprocess.Popen(
        job, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_main_job_runs_on_a_cluster(tmp_path, dashboard):
    arguments = [*SMALL_JOB, "train.epochs=1", f"work={tmp_path}/work", "teachers=[hog]", "teachers.0.input_size=32"]
    submission = _submit(dashboard, *arguments)
    text = submission.communicate(timeout=240)[0]
    assert submission.returncode == 0, text
    assert " MiB of " in text.splitlines()[0]
    assert "cluster: 1 nodes, 4 CPUs, 0 GPUs" in text
    assert '{"time": ' in text  # REGLA_LOG=json of the head node
    figures = json.loads(next(line for line in text.splitlines() if line.startswith('{"knn_before"')))
    assert figures["shards_computed"] == 4
    assert 0 <= figures["knn_after"] <= 100
    (run,) = (tmp_path / "work/runs").iterdir()
    assert (run / "student/student.safetensors").exists()


def test_the_exit_code_is_that_of_the_job(dashboard):
    submission = _submit(dashboard, "train.epoch=5")
    assert "did you mean train.epochs?" in submission.communicate(timeout=120)[0]
    assert submission.returncode == 2


def test_a_job_that_was_stopped_does_not_look_like_success(tmp_path, dashboard):
    submission = _submit(dashboard, *SMALL_JOB, "teachers=[hog]", "train.epochs=1000", f"work={tmp_path}/work")
    job = next(line.split()[2].rstrip(";") for line in submission.stdout if line.startswith("submitted as "))
    JobSubmissionClient(dashboard).stop_job(job)
    assert "STOPPED" in submission.communicate(timeout=120)[0]
    assert submission.returncode == 130
