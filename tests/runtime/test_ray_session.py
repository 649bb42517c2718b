import ipaddress
import os
import platform
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pipeline.errors import UserError
from pipeline.runtime.openmp import short_waits
from pipeline.runtime.ray_servers import _start
from pipeline.runtime.ray_session import (
    _EMBEDDED,
    _workers_environment,
    before_shutdown,
    check_devices,
    connect,
    cpus_per_worker,
    devices,
    is_cluster,
    is_submitted_job,
)
from tests.processes import descendants


def test_an_address_that_nothing_listens_on_is_an_immediate_error(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address} cannot be reached"), connect():
        pass


@pytest.mark.parametrize(
    "error",
    [
        Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed to start"
        ),
        RuntimeError("Failed to start GCS.  Last 3 lines of error files:\n ... Please check gcs_server.out"),
    ],
)
def test_a_machine_too_busy_for_ray_is_one_line(monkeypatch, error):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", Mock(side_effect=error))
    monkeypatch.setattr("pipeline.runtime.ray_session._check_loopback", lambda: None)
    with (
        pytest.raises(UserError, match=r"^Ray did not start on this machine \(.*run the same command again") as raised,
        connect(),
    ):
        pass
    assert "\n" not in str(raised.value)


def test_a_thread_that_uses_ray_ends_before_the_session(monkeypatch):
    ended = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", Mock())
    monkeypatch.setattr("ray.shutdown", lambda: ended.append("session"))
    monkeypatch.setattr("pipeline.runtime.ray_session._check_loopback", lambda: None)
    thread = before_shutdown(lambda: ended.append("thread"))

    def job():
        with connect():
            thread.__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()
    thread.__exit__(None, None, None)
    assert ended == ["thread", "session"]


@pytest.mark.usefixtures("ray_session")
def test_within_an_open_session_that_one_is_used_and_stays():
    import ray

    node = ray.get_runtime_context().get_node_id()
    with connect():
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.is_initialized()


def test_settings_of_an_embedded_session_end_with_it(monkeypatch):
    """A later connection of the process may be to a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for name in _EMBEDDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    theirs = {"RAY_AUTH_MODE": "token"}

    def settings():
        return {name: os.environ[name] for name in _EMBEDDED if name in os.environ}

    with connect():
        assert settings() == _EMBEDDED | theirs
    assert settings() == theirs
    with pytest.raises(KeyboardInterrupt), connect():
        raise KeyboardInterrupt
    assert settings() == theirs
    monkeypatch.setenv("RAY_ADDRESS", "a-cluster:6379")
    with connect():
        assert settings() == theirs


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"CPU": 8.0}, (0.0, "CPU")),
        ({"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}, (8.0, "8 x H100")),
        ({"GPU": 3.0, "accelerator_type:L4": 1.0, "accelerator_type:A10G": 2.0}, (3.0, "3 x A10G or L4")),
        ({"GPU": 1.0}, (1.0, "1 x GPU")),
    ],
)
def test_devices_are_the_gpus_of_the_session(monkeypatch, resources, expected):
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert devices() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_gpus_that_torch_cannot_use_are_refused_at_the_start(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert check_devices() == "CPU"
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0, "accelerator_type:H100": 1.0})
    with pytest.raises(UserError, match=r"torch .* cannot use the 2 x H100: .*or set CUDA_VISIBLE_DEVICES= "):
        check_devices()


@pytest.mark.usefixtures("ray_session")
def test_workers_import_this_checkout_and_see_what_the_session_set():
    import ray

    @ray.remote
    def look():
        import pipeline

        return pipeline.__path__[0], os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"]

    import pipeline

    assert ray.get(look.remote()) == (pipeline.__path__[0], "0")


@pytest.mark.usefixtures("ray_session")
def test_workers_share_the_cores_with_other_programs():
    import ray

    @ray.remote
    def look():
        return os.nice(0), os.environ.get("GOMP_SPINCOUNT")

    niceness, spins = ray.get(look.remote())
    assert niceness == os.nice(0)
    assert spins == {**os.environ, **short_waits()}.get("GOMP_SPINCOUNT")


@pytest.mark.usefixtures("ray_session")
def test_an_embedded_session_starts_no_server_that_only_a_cluster_needs():
    commands = " ".join(descendants(os.getpid()).values())
    assert "/raylet/raylet " in commands
    assert "/dashboard/" not in commands  # neither its server nor its agent
    assert "/autoscaler/" not in commands


def test_the_agent_starts_where_its_ports_cannot_be_written():
    started = []
    command = [
        "raylet",
        "--dashboard_agent_command=python agent.py",
        "--session_dir=/nowhere",
    ]  # of a version without node ids
    _start(lambda command, kind: started.append((command, kind)), None, command, "raylet")
    assert started == [(command, "raylet")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.usefixtures("ray_session")
def test_memory_that_a_workers_thread_freed_is_still_there():
    import ray

    @ray.remote
    class Worker:
        def page_faults(self):
            from resource import RUSAGE_THREAD, getrusage

            import numpy as np

            from pipeline.runtime.allocator import keep_freed_memory

            keep_freed_memory()
            faults = []
            for _ in range(3):
                before = getrusage(RUSAGE_THREAD).ru_minflt
                np.full(256 << 20, 1, np.uint8)
                faults.append(getrusage(RUSAGE_THREAD).ru_minflt - before)
            return faults

    first, *again = ray.get(Worker.options(max_concurrency=2).remote().page_faults.remote())
    assert first > 100
    assert max(again) < first / 10


@pytest.mark.parametrize(
    ("nodes", "workers", "most", "expected"),
    [
        ([(4, 0)], 1, 2, 2),
        ([(4, 0)], 2, 16, 1),
        ([(8, 1)], 1, 16, 7),
        ([(8, 1)] * 4, 1, 16, 8),  # no node has 16
        ([(96, 8)] + [(16, 0)] * 4, 8, 16, 12),  # decoding nodes have no GPU
        ([(3, 0)] * 3, 4, 16, 1),
        ([(0, 0), (8, 1), (8, 1)], 8, 16, 7),  # more may come
        ([], 2, 16, 1),
    ],
)
def test_workers_ask_for_no_more_cpus_than_nodes_have(monkeypatch, nodes, workers, most, expected):
    up = [{"Alive": True, "Resources": {name: n for name, n in (("CPU", c), ("GPU", g)) if n}} for c, g in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [*up, {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}])
    total = {"CPU": sum(cpus for cpus, _ in nodes), "GPU": sum(gpus for _, gpus in nodes)}
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    assert cpus_per_worker(workers, most) == expected


def test_variables_of_a_submitted_job_are_not_set_twice(monkeypatch):
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "x")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert _workers_environment() == {"MALLOC_ARENA_MAX": "1"}
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert _workers_environment() == {}


@pytest.mark.parametrize(("address", "expected"), [(None, False), ("", False), ("local", False), ("auto", True)])
def test_a_cluster_is_what_an_address_names(monkeypatch, address, expected):
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert is_cluster() == expected


@pytest.mark.parametrize("variable", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_SUBMISSION_ID"])
def test_a_submitted_job_is_known_by_its_environment(monkeypatch, variable):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAY_JOB_SUBMISSION_ID", raising=False)
    assert not is_submitted_job()
    monkeypatch.setenv(variable, "x")
    assert is_submitted_job()


def test_the_drivers_own_warnings_are_still_shown(ray_session):
    import logging

    assert logging.getLogger("pipeline").isEnabledFor(logging.WARNING)


@pytest.mark.usefixtures("ray_session")
def test_all_servers_of_an_embedded_session_listen_on_loopback_alone():
    """Nothing authenticates there: whoever reaches one of them runs code."""
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    listening = _listening({os.getpid(), *descendants(os.getpid())})
    assert len(listening) > 3
    assert all(address.is_loopback for address in listening), listening


@pytest.mark.usefixtures("ray_session")
def test_the_memory_monitor_of_an_embedded_session_is_off():
    """Other programs that fill the machine would have it kill the training."""
    (raylet,) = (pid for pid, title in descendants(os.getpid()).items() if "raylet/raylet " in title)
    assert "RAY_memory_monitor_refresh_ms=0" in Path(f"/proc/{raylet}/environ").read_text().split("\0")
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert "MemoryMonitor disabled" in (logs / "raylet.out").read_text()


def test_the_memory_monitor_of_a_cluster_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.delenv("RAY_memory_monitor_refresh_ms", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with connect():
        assert "RAY_memory_monitor_refresh_ms" not in os.environ


def test_a_session_that_would_listen_on_every_network_is_refused(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.2")
    with (
        pytest.raises(UserError, match=r"set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before the first `import ray`"),
        connect(),
    ):
        pass


def _listening(pids):
    """Addresses on which these processes of this network namespace accept connections."""
    sockets = {inode for pid in pids for inode in _sockets(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                words = bytes.fromhex(local.partition(":")[0])
                data = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                address = ipaddress.ip_address(data)
                found.append(getattr(address, "ipv4_mapped", None) or address)
    return found


def _sockets(pid):
    """Inodes of a process's sockets."""
    try:
        files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []  # it has ended
    return [name[8:-1] for name in files if name.startswith("socket:[")]
