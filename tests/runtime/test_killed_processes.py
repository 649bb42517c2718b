"""A process of a job that is killed for lack of memory: one line says so, and a second start resumes."""

import os
from types import SimpleNamespace

import pytest
from ray import exceptions

from pipeline.errors import UserError
from pipeline.runtime.ray_session import _killed_in_one_line, connect
from pipeline.training.config import TrainConfig
from pipeline.training.ray_train import fit
from tests.cluster.nodes import cluster
from tests.faults import FORK
from tests.training.tiny_task import lines, make_tiny_task

OUT_OF_MEMORY = exceptions.OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.7, ID: 92ed) was 95 GB"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OUT_OF_MEMORY, "Ray killed a process of the job because node 10.0.0.7 ran out of memory"),
        (exceptions.WorkerCrashedError(), "a process of the job died"),
    ],
)
@pytest.mark.parametrize("wrap", ["bare", "worker", "health", "controller", "cause"])
def test_a_killed_process_is_one_line(error, expected, wrap):
    wrapped = RuntimeError("pages\nof\ntraceback")
    if wrap == "worker":
        wrapped.worker_failures = {1: ValueError("collateral"), 0: error}
    elif wrap == "health":
        wrapped.worker_failures = {0: SimpleNamespace(health_check_failure=error)}
    elif wrap == "controller":
        wrapped.controller_failure = error
    elif wrap == "cause":
        wrapped.__cause__ = error
    else:
        wrapped = error
    with pytest.raises(UserError, match=rf"^{expected}.*the same command resumes from it$"), _killed_in_one_line():
        raise wrapped


@pytest.mark.parametrize("error", [ValueError("a bug"), exceptions.RayActorError(actor_init_failed=True)])
def test_any_other_error_keeps_its_traceback(error):
    with pytest.raises(type(error)), _killed_in_one_line():
        raise error


def _train(address, folder, delay, answer):
    """Train on a cluster with `delay` seconds before each batch; send the line of the error, or ""."""
    os.environ["RAY_ADDRESS"] = address
    config = TrainConfig(epochs=2, batch_size=2, lr=0.05, workers=1, precision="float32")
    try:
        with connect():
            fit(make_tiny_task, {"folder": str(folder), "delay": delay}, config, str(folder / "train"), lambda *_: None)
    except UserError as error:
        answer.send(str(error))
    else:
        answer.send("")


def _start(address, folder, delay=0.0):
    here, there = FORK.Pipe()
    process = FORK.Process(target=_train, args=(address, folder, delay, there))
    process.start()
    assert here.poll(300)
    process.join(60)
    return here.recv()


@pytest.mark.slow
def test_ray_kills_for_lack_of_memory_and_the_next_start_trains(tmp_path):
    # An embedded session earlier in this process has switched the monitor off.
    watched = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "250"}
    with cluster(2, environment=watched) as nodes:
        line = _start(nodes[0].address, tmp_path, delay=15.0)  # a quiet machine trains before the monitor looks
    assert "ran out of memory: free memory there" in line
    assert "\n" not in line
    with cluster(2) as nodes:
        assert _start(nodes[0].address, tmp_path) == ""
    assert len(lines(tmp_path, "batches")) == 12
