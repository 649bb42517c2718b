"""The Ray session of a job: embedded on this machine, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.runtime.allocator import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[2]

# Read by Ray when it is imported or when its processes start, hence before any import of it. A user's own value wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or a job under `uv run` packs the working directory
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line that a worker prints comes twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # ours count images, these count shards
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "7200",  # starvation is an error, not a hang; a shard may take an hour
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}
_EMBEDDED = {
    "RAY_AUTH_MODE": "disabled",  # nothing but loopback
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# There is no dashboard. One of Ray Train's actors asks for it all the same, and where another Ray runs on this machine it
# would not know which one to ask, and die with a traceback: a port that nothing listens on is an answer.
_NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}


def is_submitted_job() -> bool:
    """Whether `ray job submit` started this process."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_SUBMISSION_ID" in os.environ


def is_cluster() -> bool:
    """Whether jobs run on a cluster that RAY_ADDRESS names, and not in a session of their own."""
    return _address() != "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


@dataclass(frozen=True)
class Hardware:
    """What the Ray session has: nodes, logical CPUs, GPUs and their types."""

    nodes: int
    cpus: int
    gpus: int
    types: tuple[str, ...]

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.types)})" if self.types else ""
        return f"{self.nodes} nodes, {self.cpus} CPUs, {self.gpus} GPUs{kinds}"


def hardware() -> Hardware:
    """What there is now, without what an autoscaler may add."""
    import ray

    there = ray.cluster_resources()
    types = sorted(name.removeprefix("accelerator_type:") for name in there if name.startswith("accelerator_type:"))
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return Hardware(nodes, int(there.get("CPU", 0)), int(there.get("GPU", 0)), tuple(types))


def alive_node_resources() -> list[dict[str, float]]:
    """Resources of every node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_slots(cpus: int) -> int:
    """How many workers of so many CPUs, and of a GPU where there are any, the nodes that are up have room for."""
    nodes = alive_node_resources()
    gpus = any(node.get("GPU") for node in nodes)
    return sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else inf)) for node in nodes)


def cpus_per_worker(workers: int, most: int) -> int:
    """CPUs for each of so many workers, `most` at most, so that nodes have room for them and a CPU is left for Ray's tasks.

    Ray would wait for ever for workers that want more than any node has.
    """
    there, fit = hardware().cpus, min(workers, worker_slots(1))
    return next((cpus for cpus in range(most, 1, -1) if worker_slots(cpus) >= fit and fit * cpus < there), 1)


@contextmanager
def connect() -> Iterator[None]:
    """Connect to Ray, and leave it at the end; within a session that is open already, use that one.

    Without RAY_ADDRESS a session of its own starts on this machine, and ends with the job. Workers import this
    checkout and the modules of the current directory; those of a submitted job import what it uploaded.

    Raises:
        UserError: where the cluster cannot be reached.
    """
    address = _address()
    embedded = address == "local"
    for name, value in {**_ENVIRONMENT, **(_EMBEDDED if embedded else {})}.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    arguments = _embedded_arguments() if embedded else {}
    arguments["runtime_env"] = {"env_vars": _workers_environment(embedded)}
    try:
        _probe(address)
        with _logging_as_it_was(), _on_loopback(embedded):
            ray.init(**arguments, log_to_driver=True, logging_level=logging.WARNING)
    except OSError as error:
        reason = one_line(f"{error}: {error.__cause__}" if error.__cause__ else error)
        raise UserError(
            f"RAY_ADDRESS={address} cannot be reached ({reason}); start it, or unset RAY_ADDRESS"
        ) from error
    _quieten_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def devices() -> tuple[float, str]:
    """Number of GPUs in the session, and what it computes on, in words."""
    import ray

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0)
    if not gpus:
        return 0.0, "CPU"
    kinds = [name.partition(":")[2] for name in sorted(resources) if name.startswith("accelerator_type:")]
    return gpus, f"{gpus:g} x {' or '.join(kinds) or 'GPU'}"


def hardware_line() -> str:
    """What the session computes on, as a line to print.

    Raises:
        UserError: as `check_devices`.
    """
    return f"cluster: {hardware()}" if is_cluster() else f"computing on {check_devices()}"


def check_devices() -> str:
    """What a session on this machine computes on, in words.

    Raises:
        UserError: where that is GPUs that torch cannot use.
    """
    import torch

    gpus, kind = devices()
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"there are {kind}, which torch {torch.__version__} cannot use: is the driver too old for CUDA {torch.version.cuda}? "
            "Renew it, or set CUDA_VISIBLE_DEVICES= (nothing) to compute on the CPU"
        )
    return kind


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Ray's LoggingConfig is meant for its workers, and changes the driver's root logger too."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def _on_loopback(embedded: bool) -> Iterator[None]:
    """While an embedded session starts: without this its servers listen on every network, and nothing authenticates.

    Ray has this switch for Windows and macOS and reads its variable when it is imported, which may be long ago.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not embedded
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _probe(address: str) -> None:
    """Fail at once where nothing listens: Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _import_path() -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.getcwd(), os.environ.get("PYTHONPATH")]))


def _workers_environment(embedded: bool) -> dict[str, str]:
    """Variables of the workers, of which a user's own value wins."""
    if is_submitted_job():  # with variables of its own, which Ray refuses to be told twice
        return {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    ours = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    return {"PYTHONPATH": _import_path(), **ours, **(_NO_DASHBOARD if embedded else {})}


def _embedded_arguments() -> dict[str, Any]:
    import ray

    return {
        "address": "local",
        "include_dashboard": False,
        # Logical CPUs: a worker or actor, and one more for the tasks that feed it.
        "num_cpus": max(4, os.cpu_count() or 1),
        "object_store_memory": 512 << 20,  # features never travel through it
        # Without a dashboard one of Ray Train's helpers warns every second that it cannot query it.
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }


def _quieten_ray_data() -> None:
    import ray.data

    ray.data.DataContext.get_current().print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
