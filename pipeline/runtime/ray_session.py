"""The Ray session of a job: embedded on this machine, or the cluster that RAY_ADDRESS names."""

import ipaddress
import logging
import os
import re
import socket
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.runtime.allocator import ENVIRONMENT
from pipeline.runtime.fork_server import fork_server
from pipeline.runtime.openmp import short_waits
from pipeline.runtime.ray_servers import light_session

REPOSITORY = Path(__file__).resolve().parents[2]
"""Folder of the packages: a checkout, or site-packages."""

IS_INSTALLED = REPOSITORY in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}

# Ray reads these when it is imported or when its processes start. A user's own value wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or a job under `uv run` packs the working directory
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line that a worker prints comes twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # ours count images, these count shards
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "7200",  # starvation is an error, not a hang; a shard may take an hour
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or a thread that outlasts a Ctrl-C would start another session
}
_EMBEDDED = {
    "RAY_AUTH_MODE": "disabled",  # everything listens on loopback
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would set up the loggers of the job's own process anew
    # When memory runs low, the monitor kills Ray's newest process, whichever program uses the memory.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_prestart_worker_first_driver": "0",  # training uses none of them, and tasks start what they need
    "RAY_worker_niceness": "0",  # at Ray's 15, one busy process of another program stops a training (docs/results.md)
}
_STARTUP_FAILED = re.compile(r"during startup|raylet|GCS")
_GPU_TYPE = "accelerator_type:"
_MULTI_NODE_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_in_process = False
_before_shutdown: list[Callable[[], None]] = []


def is_submitted_job() -> bool:
    """Whether `ray job submit` started this process."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_SUBMISSION_ID" in os.environ


def is_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster; otherwise jobs run in an embedded session."""
    return _address() != "local"


def is_in_process() -> bool:
    """Whether the job computes in this process, without Ray (`connect`)."""
    return _in_process


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def is_connected() -> bool:
    """Whether a Ray session is open, and the job uses it."""
    if is_in_process():
        return False
    import ray

    return bool(ray.is_initialized())


@dataclass(frozen=True)
class Hardware:
    """Nodes, logical CPUs, GPUs and GPU types of the Ray session."""

    nodes: int
    cpus: int
    gpus: int
    types: tuple[str, ...]

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.types)})" if self.types else ""
        return f"{self.nodes} nodes, {self.cpus} CPUs, {self.gpus} GPUs{kinds}"


def hardware() -> Hardware:
    """The present hardware, without what an autoscaler may add."""
    import ray

    total = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return Hardware(nodes, int(total.get("CPU", 0)), int(total.get("GPU", 0)), tuple(_gpu_types(total)))


def _gpu_types(resources: Mapping[str, float]) -> list[str]:
    return sorted(name.removeprefix(_GPU_TYPE) for name in resources if name.startswith(_GPU_TYPE))


def alive_node_resources() -> list[dict[str, float]]:
    """Resources of each alive node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpu_nodes() -> list[str]:
    """Ids of the alive nodes with GPUs."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


def worker_slots(cpus: int) -> int:
    """Number of workers with `cpus` CPUs, and one GPU if there are GPUs, that fit on the alive nodes."""
    nodes = alive_node_resources()
    gpus = any(node.get("GPU") for node in nodes)
    return sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else inf)) for node in nodes)


def cpus_per_worker(workers: int, most: int) -> int:
    """CPUs per worker, at most `most`, such that all workers and Ray's own tasks fit; Ray would wait forever otherwise."""
    total, fit = hardware().cpus, min(workers, worker_slots(1))
    return next((cpus for cpus in range(most, 1, -1) if worker_slots(cpus) >= fit and fit * cpus < total), 1)


@contextmanager
def connect(in_process: bool = False) -> Iterator[None]:
    """Connect to Ray and disconnect at the end; a session that is already open is used unchanged.

    Without RAY_ADDRESS an embedded session starts on this machine and ends with the job. Workers import this checkout and
    modules of the current directory; workers of a submitted job import what it uploaded.

    Args:
        in_process: use no Ray session: tasks, actors and the training worker run in this process, one after the other.

    Raises:
        UserError: if the cluster cannot be reached, or if a process of the job was killed, for example for lack of memory.
    """
    if in_process:
        with _without_ray():
            yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A later connection of this process may be to a cluster.
    waits = short_waits()
    embedded = {} if is_cluster() else {**_EMBEDDED, **waits}
    # A fork's threads wait as those of this process do, and torch reads how only when it is imported.
    forking = fork_server() if embedded and not waits else nullcontext()
    with _environment({name: value for name, value in embedded.items() if name not in os.environ}), forking as forks:
        import_ray()
        with _session(_address(), forks):
            yield


@contextmanager
def before_shutdown(end: Callable[[], None]) -> Iterator[None]:
    """A block in a thread that uses Ray. The job's own session calls `end` before it shuts down; it ends the block and waits."""
    _before_shutdown.append(end)
    try:
        yield
    finally:
        _before_shutdown.remove(end)


@contextmanager
def _without_ray() -> Iterator[None]:
    """See `connect`; `is_in_process` is true in this block."""
    global _in_process
    before, _in_process = _in_process, True
    if os.environ.get("PYTHONBREAKPOINT", "").startswith(
        "ray."
    ):  # of an earlier session: it waits for Ray's own debugger
        del os.environ["PYTHONBREAKPOINT"]
    try:
        yield
    finally:
        _in_process = before


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in this block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _session(address: str, forks: str | None) -> Iterator[None]:
    """See :func:`connect`."""
    import ray

    if ray.is_initialized():
        with _killed_in_one_line():
            yield
        return
    embedded = address == "local"
    variables = _workers_environment()
    # Processes of a runtime environment need an agent and start anew; those of an embedded session inherit from this one.
    arguments = _embedded_arguments() if embedded else {"runtime_env": {"env_vars": variables}}
    if embedded:
        _check_loopback()
    try:
        _probe(address)
        light = light_session(forks) if embedded else nullcontext()
        with _keep_root_logger(), _environment(variables if embedded else {}), light:
            ray.init(**arguments, log_to_driver=True, logging_level=logging.WARNING)
    except OSError as error:
        reason = one_line(f"{error}: {error.__cause__}" if error.__cause__ else error)
        raise UserError(
            f"RAY_ADDRESS={address} cannot be reached ({reason}); start it, or unset RAY_ADDRESS"
        ) from error
    except Exception as error:
        if not _STARTUP_FAILED.search(str(error)):  # Ray raises plain Exceptions and RuntimeErrors
            raise
        raise UserError(
            f"Ray did not start on this machine ({one_line(error, 120)}): it is very busy, or short of memory; run "
            "the same command again when it is less so"
        ) from error
    try:
        with _killed_in_one_line():
            yield
    finally:
        for end in [*_before_shutdown]:
            end()
        ray.shutdown()


def devices() -> tuple[float, str]:
    """Number of GPUs of the session, and its devices in words."""
    if is_in_process():
        import torch

        return (1.0, torch.cuda.get_device_name()) if torch.cuda.is_available() else (0.0, "CPU")
    import ray

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0)
    if not gpus:
        return 0.0, "CPU"
    return gpus, f"{gpus:g} x {' or '.join(_gpu_types(resources)) or 'GPU'}"


def hardware_line() -> str:
    """The session's hardware, as a line to print; raises like `check_devices`."""
    if is_in_process():
        return f"computing on {check_devices()}, in this process"
    return f"cluster: {hardware()}" if is_cluster() else f"computing on {check_devices()}"


def check_devices() -> str:
    """The devices of an embedded session, in words; UserError if torch cannot use its GPUs."""
    import torch

    gpus, kind = devices()
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} cannot use the {kind}: is the driver too old for CUDA {torch.version.cuda}? "
            "Update it, or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
        )
    return kind


def import_ray() -> None:
    """Import Ray with its multi-node switch off, so that the servers of an embedded session listen on loopback only.

    Ray has this variable for Windows and macOS, and reads it at import only; it does not affect clusters.
    """
    with _environment({_MULTI_NODE_SWITCH: "0"}):  # `ray start` in a child process refuses to form a cluster with it
        import ray  # noqa: F401


def _check_loopback() -> None:
    """Refuse to start servers that would listen on every network without authentication."""
    import ray

    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        raise UserError(
            "Ray was imported before this job, and its servers would listen on every network without authentication: set "
            f"{_MULTI_NODE_SWITCH}=0 before the first `import ray`, or call ray.init yourself, and this session is used"
        )


@contextmanager
def _killed_in_one_line() -> Iterator[None]:
    """Reduce the traceback of a killed process of the job to one line; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason_of_kill(error)
        if reason is None:
            raise
        raise UserError(f"{reason}; everything saved so far is kept, and the same command resumes from it") from error


def _reason_of_kill(error: BaseException | None) -> str | None:
    """What killed a process of the job, and the remedy; None if none was killed."""
    from ray import exceptions

    if error is None:
        return None
    if isinstance(error, exceptions.OutOfMemoryError):
        node = re.search(r"IP: ([^,)\s]+)", str(error))
        where = f"node {node[1]}" if node else "a node"
        return (
            f"Ray killed a process of the job because {where} ran out of memory: free memory there, or use larger nodes"
        )
    crashed = isinstance(error, exceptions.WorkerCrashedError | exceptions.NodeDiedError)
    if crashed or (isinstance(error, exceptions.RayActorError) and not error.actor_init_failed):
        return f"a process of the job died ({one_line(error)}): check that the machine has memory left"
    failures = getattr(error, "worker_failures", {}).values()  # of ray.train.WorkerGroupError
    wrapped = [getattr(error, name, None) for name in ("health_check_failure", "controller_failure", "__cause__")]
    return next((reason for one in (*failures, *wrapped) if (reason := _reason_of_kill(one))), None)


@contextmanager
def _keep_root_logger() -> Iterator[None]:
    """Ray's LoggingConfig is meant for its workers, and changes the driver's root logger too."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _probe(address: str) -> None:
    """Fail at once if nothing listens there: Ray would retry for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _import_path() -> str:
    checkout = None if IS_INSTALLED else str(REPOSITORY)  # before the standard library, where no site-packages belong
    return os.pathsep.join(filter(None, [checkout, os.getcwd(), os.environ.get("PYTHONPATH")]))


def _workers_environment() -> dict[str, str]:
    """Environment variables of the workers; a user's own value wins."""
    if is_submitted_job():  # Ray refuses variables that the submission has set already
        return {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    ours = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    return {"PYTHONPATH": _import_path(), **ours}


def _embedded_arguments() -> dict[str, Any]:
    import ray

    return {
        "address": "local",
        "include_dashboard": False,
        # logical: a worker or actor needs a second CPU for the tasks that feed it
        "num_cpus": max(4, os.cpu_count() or 1),
        "object_store_memory": 512 << 20,  # features never travel through it
        # Ray Train warns every second that there is no dashboard.
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }
