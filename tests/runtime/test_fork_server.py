"""Workers as forks of the job: what they share with it, what they must not, and that Ray starts its own where there are none."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.runtime import fork_client, fork_server
from pipeline.runtime.fork_client import make_request
from pipeline.runtime.ray_servers import _start
from tests.conftest import REPOSITORY
from tests.processes import descendants, kill, read_proc

RAY_FOLDER = "/somewhere/ray/_private/workers"
PLAIN = [sys.executable, f"{RAY_FOLDER}/default_worker.py", "--node-id=1"]
WITH_VARIABLES = [sys.executable, f"{RAY_FOLDER}/setup_worker.py", *PLAIN[1:], "--language=PYTHON"]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")


def context(**values):
    """The argument by which Ray passes a runtime environment; it gives every field."""
    known = {"command_prefix": [], "env_vars": {}, "py_executable": sys.executable, "java_jars": []}
    return f"--serialized-runtime-env-context={json.dumps({**known, **values})}"


def test_a_request_is_the_command_of_ray_with_its_environment(monkeypatch):
    monkeypatch.setenv("COLOUR", "red")
    request = make_request(PLAIN)
    assert request["arguments"] == PLAIN[1:]
    assert request["environment"]["COLOUR"] == "red"
    assert request["folder"] == os.getcwd()


def test_variables_of_a_runtime_environment_go_with_the_request(monkeypatch):
    monkeypatch.setenv("COLOUR", "red")
    request = make_request([*WITH_VARIABLES, context(env_vars={"COLOUR": "blue"})])
    assert request["arguments"] == PLAIN[1:]
    assert request["environment"]["COLOUR"] == "blue"


@pytest.mark.parametrize(
    "other",
    [
        {"py_executable": "/other/python"},
        {"command_prefix": ["cd", "/somewhere", "&&"]},
        {"override_worker_entrypoint": "/other/default_worker.py"},
        {"java_jars": ["/a.jar"]},
        {"env_vars": {"PATH": "/own:${PATH}"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_runtime_environment_that_is_more_than_variables_is_left_to_ray(other):
    assert make_request([*WITH_VARIABLES, context(**other)]) is None


@pytest.mark.parametrize("script", ["other_worker.py", "-s"])
def test_a_command_that_is_not_known_is_left_to_ray(script):
    assert make_request([sys.executable, script, PLAIN[1]]) is None
    assert make_request([sys.executable]) is None


def test_in_a_deleted_folder_a_worker_is_a_new_process(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert make_request(PLAIN) is None


def test_the_raylet_gets_the_client_before_its_own_command():
    started = []
    command = ["raylet", "--python_worker_command=python 'a b.py' --x=1", "--session_dir=/nowhere"]
    _start(lambda command: started.append(command), "/tmp/x/socket", command)
    client = f"{sys.executable} -I -S {fork_client.__file__} /tmp/x/socket"
    assert started == [["raylet", f"--python_worker_command={client} python 'a b.py' --x=1", "--session_dir=/nowhere"]]


def test_where_ray_is_imported_already_nothing_forks():
    assert "ray" in sys.modules
    with fork_server.fork_server() as address:
        assert address is None


@linux_only
@pytest.mark.parametrize("is_known_to_python", [True, False])
def test_beside_another_thread_nothing_forks(monkeypatch, is_known_to_python):
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(threading, "active_count", lambda: 1 + is_known_to_python)
    named, ended = threading.Event(), threading.Event()

    def wait():
        if not is_known_to_python:
            Path("/proc/thread-self/comm").write_text("AwsEventLoop1")
        named.set()
        ended.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        named.wait()
        with fork_server.fork_server() as address:
            assert address is None
    finally:
        ended.set()
        thread.join()


@linux_only
def test_where_a_fork_fails_ray_starts_its_workers(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fork_server, "_has_threads", lambda: False)
    monkeypatch.setattr(fork_server, "one_arena", lambda: None)
    monkeypatch.setattr(os, "fork", Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory")))
    with fork_server.fork_server() as address:
        assert address is None
    assert not [*tmp_path.iterdir()]


@linux_only
def test_where_the_address_is_too_long_ray_starts_its_workers(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(fork_server, "_has_threads", lambda: False)
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with fork_server.fork_server() as address:
        assert address is None
    assert not [*folder.iterdir()]


JOB = """
import logging, os, signal, subprocess, sys, tempfile
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import torch
from pipeline.runtime import fork_client
from pipeline.runtime import fork_server as module
from pipeline.runtime.fork_server import fork_server

def main(workers):
    if "BREAK" in os.environ:
        setattr(module, os.environ["BREAK"], None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.randn(500, 500) @ torch.randn(500, 500)
    torch.nn.Conv2d(3, 8, 3)(torch.randn(8, 3, 64, 64)).sum().backward()  # OpenMP has threads now
    logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
    kept = tempfile.TemporaryDirectory()
    helper = get_context("forkserver").Process(target=os.getpid)
    helper.start()
    helper.join()
    with fork_server() as address:
        print(f"address {address}", flush=True)
        for worker in workers:
            subprocess.run([sys.executable, "-I", "-S", fork_client.__file__, address, sys.executable, worker, "--x=1"], env={
                **os.environ, "COLOUR": "red"}, cwd="/", check=True)
        print("asked", flush=True)
        sys.stdin.readline()
        assert os.path.exists(kept.name)
    print(f"gone {not Path(address).parent.exists()}", flush=True)

if __name__ == "__main__":
    main(sys.argv[1:])
"""

WORKER = """
import atexit, json, logging, os, signal, sys
from multiprocessing import get_context
modules = set(sys.modules)
import numpy as np
import torch

def main():
    torch.randn(500, 500) @ torch.randn(500, 500)
    torch.nn.Conv2d(3, 8, 3)(torch.randn(8, 3, 64, 64)).sum().backward()
    helper = get_context("forkserver").Process(target=os.getpid)
    helper.start()
    helper.join()
    path = os.path.join(os.path.dirname(__file__), f"{os.getpid()}.json")
    facts = {
        "had_torch": "torch" in modules,
        "arguments": sys.argv,
        "name": __name__,
        "colour": os.environ["COLOUR"],
        "folder": os.getcwd(),
        "path": sys.path,
        "handlers": len(logging.getLogger().handlers),
        "random": [float(np.random.rand()), float(torch.rand(1))],
        "helper": helper.exitcode,
        "signals": [signal.getsignal(number).name for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)],
        "interrupt": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "sockets": [link for link in map(read, os.listdir("/proc/self/fd")) if link.startswith("socket:")],
    }
    print("from the worker", flush=True)
    atexit.register(lambda: open(path, "w").write(json.dumps(facts)))

if __name__ == "__main__":
    main()
"""
READ = """
import os

def read(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""
"""


@pytest.fixture
def job(tmp_path):
    """Starts a job that asks for workers with this text, and then waits for a line."""
    running = []

    def start(*workers):
        scripts = []
        for number, text in enumerate(workers):
            folder = tmp_path / str(number)
            folder.mkdir()
            scripts.append(folder / "default_worker.py")
            scripts[-1].write_text(READ + text)
        process = subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, scripts)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def found(folder, count, seconds=60):
    """What workers wrote into a folder and its folders."""
    deadline = time.monotonic() + seconds
    while len(files := [*folder.rglob("*.json")]) < count or not all(file.read_text() for file in files):
        assert time.monotonic() < deadline, "a worker did not end"
        time.sleep(0.1)
    return [json.loads(file.read_text()) for file in files]


@linux_only
def test_a_fork_is_the_worker_that_a_new_process_would_be(job, tmp_path):
    process = job(WORKER, WORKER)
    first, second = found(tmp_path, 2)
    output, _ = process.communicate("\n")
    assert process.returncode == 0
    assert output.count("from the worker") == 2
    assert output.count("address") == 1  # what the job had printed is not printed again
    assert "gone True" in output
    for facts in (first, second):
        assert facts["had_torch"]
        script = facts["arguments"][0]
        assert facts["arguments"] == [script, "--x=1"]
        assert str(Path(script).parent) in facts["path"]
        assert (facts["name"], facts["colour"], facts["folder"], facts["handlers"]) == ("__main__", "red", "/", 0)
        assert facts["helper"] == 0
        assert facts["signals"] == ["SIG_DFL", "SIG_DFL", "SIG_IGN"]  # the last as in the job
        assert facts["interrupt"]
        assert not facts["sockets"]
    assert not set(first["random"]) & set(second["random"])


@linux_only
def test_a_fork_that_fails_before_it_begins_becomes_a_new_process(job, tmp_path, monkeypatch):
    monkeypatch.setenv("BREAK", "_forget_job")
    process = job(WORKER)
    (facts,) = found(tmp_path, 1)
    process.communicate("\n")
    assert process.returncode == 0
    assert not facts["had_torch"]
    assert facts["arguments"][1:] == ["--x=1"]
    assert (facts["colour"], facts["folder"]) == ("red", "/")


@linux_only
@pytest.mark.parametrize("function", ["tempfile.mkdtemp", "socket.socketpair"])
def test_where_disk_or_descriptors_are_used_up_ray_starts_its_workers(monkeypatch, function):
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(fork_server, "_has_threads", lambda: False)
    monkeypatch.setattr(function, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with fork_server.fork_server() as address:
        assert address is None


@linux_only
def test_without_its_server_a_client_starts_the_worker_itself(tmp_path):
    file = tmp_path / "default_worker.py"
    file.write_text("import sys; print(*sys.argv[1:])")
    command = [
        sys.executable,
        "-I",
        "-S",
        fork_client.__file__,
        str(tmp_path / "socket"),
        sys.executable,
        str(file),
        "--x=1",
    ]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "--x=1\n"


def _ignores(process, number):
    (line,) = [line for line in read_proc(process, "status").splitlines() if line.startswith("SigIgn:")]
    return int(line.split()[1], 16) >> (number - 1) & 1


@linux_only
def test_a_killed_job_leaves_neither_server_nor_folder(job):
    process = job()
    address = process.stdout.readline().split()[1]
    assert process.stdout.readline() == "asked\n"
    (server,) = [pid for pid, title in descendants(process.pid).items() if title == read_proc(process.pid, "cmdline")]
    while not _ignores(server, signal.SIGTERM):  # it has only just begun
        time.sleep(0.01)
    kill(server, signal.SIGTERM)  # as one that stops all processes of a job does
    time.sleep(0.2)
    assert read_proc(server, "cmdline")
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while read_proc(server, "cmdline") or Path(address).parent.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SESSION = """
import json, os, sys
from pipeline.runtime import fork_server
from pipeline.runtime.openmp import wait_shortly
from pipeline.runtime.ray_session import connect

if "spins" not in sys.argv:
    wait_shortly()
import torch

if "gpus" in sys.argv:
    fork_server._GPU_DEVICES = ("/dev/null",)
with connect():
    import ray

    def look():
        import sys
        had_torch = "torch" in sys.modules
        import torch
        return had_torch, torch.get_num_threads(), os.environ.get("COLOUR"), os.getpid()

    one = ray.get(ray.remote(num_cpus=1)(look).remote())
    actor = ray.remote(num_cpus=3)(type("Actor", (), {"look": lambda self: look()})).remote()
    three = ray.get(actor.look.remote())
    blue = ray.get(ray.remote(runtime_env={"env_vars": {"COLOUR": "blue"}})(look).remote())
left = [pid for *_, pid in (one, three, blue) if os.path.exists(f"/proc/{pid}")]
print(json.dumps([one, three, blue, left]))
"""


def session(*arguments):
    # Other tests set how threads wait.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    text = subprocess.run(
        [sys.executable, "-c", SESSION, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(text.splitlines()[-1])


@linux_only
def test_workers_of_a_session_have_what_the_job_has_imported_and_the_threads_that_ray_allows():
    one, three, blue, left = session()
    assert not left
    assert [has_torch for has_torch, *_ in (one, three, blue)] == [True, True, True]
    assert [threads for _, threads, *_ in (one, three)] == [1, min(3, os.cpu_count())]
    assert [colour for *_, colour, _ in (one, blue)] == [None, "blue"]
    assert len({worker for *_, worker in (three, blue)}) == 2


@linux_only
@pytest.mark.parametrize("reason", ["gpus", "spins"])
def test_with_gpus_or_a_torch_whose_threads_wait_long_ray_starts_its_workers(reason):
    one, three, blue, _ = session(reason)
    assert [has_torch for has_torch, *_ in (one, three, blue)] == [False, False, False]
    assert [threads for _, threads, *_ in (one, three)] == [1, min(3, os.cpu_count())]
    assert [colour for *_, colour, _ in (one, blue)] == [None, "blue"]
