"""Workers of an embedded Ray session as forks of the job, which share the pages of what it has imported.

A worker that starts anew imports torch again: two to four seconds of a processor, and 300 MiB (docs/results.md, Starting). So a
job forks a server before it imports Ray, and the raylet starts `fork_client.py`, which asks the server for a fork, in place of
a worker. Where it gets none, it becomes the worker that Ray would have started.
"""

import atexit
import contextlib
import gc
import json
import logging
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.runtime.allocator import one_arena

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_HARMLESS = {"jemalloc_bg_thd"}
"""Arrow's allocator knows of forks, as do the threads of OpenBLAS, which are named like the process."""
_SECONDS = 10
"""How long the server waits for a client that has begun to ask, and at its end for the workers."""


@contextmanager
def fork_server() -> Iterator[str | None]:
    """The address of a server that forks this process as it is now, in this block; None where that is not safe or fails.

    It is not safe if Ray is imported, whose random ids would repeat, or if another thread may hold a lock, as those of S3 may;
    and with GPUs it has not been tried.
    """
    if sys.platform != "linux" or "ray" in sys.modules or _has_threads() or any(map(os.path.exists, _GPU_DEVICES)):
        yield None
        return
    try:
        ours, theirs = socket.socketpair()
        folder = Path(tempfile.mkdtemp(prefix="regla-fork-"))  # which nobody else may enter
    except OSError:  # a full disk, or too many open files
        yield None
        return
    address = str(folder / "socket")
    server = None
    try:
        with theirs, socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):
            listener.bind(address)  # the path may be too long
            listener.listen()
            one_arena()  # or the thread that forks gets one that cannot hold a large tensor in one piece
            gc.freeze()  # a collection writes to the pages of all objects that are not frozen
            server = _fork(_serve, folder, listener, theirs, ours)
        yield address if server else None
    finally:
        ours.close()  # which ends the server
        if server:
            server.join()
        gc.unfreeze()
        shutil.rmtree(folder, ignore_errors=True)


def _has_threads() -> bool:
    """Whether there are threads of Python, or of a library that gives them names."""
    names = set()
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            names.add(file.read_text().strip())
    own = Path("/proc/self/comm").read_text().strip()
    return threading.active_count() > 1 or not names <= {own, *_HARMLESS}


def _fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Fork this process in a new thread, which has no pool of OpenMP's threads: for those, the child would wait forever.

    Raises:
        OSError: if there is not enough memory, or there are too many processes.
    """
    process = get_context("fork").Process(target=target, args=arguments)
    errors = []

    def start() -> None:
        try:
            process.start()
        except OSError as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where a process has threads
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    if errors:
        raise errors[0]
    return process


def _serve(folder: Path, listener: socket.socket, job: socket.socket, others: socket.socket) -> None:
    """Fork for every client until the job has ended."""
    others.close()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C is for the job, as in all processes of Ray
    # What ends the job ends this process after it, and a worker that has ended is gone.
    ignored: dict[int, Any] = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    }
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.close(nothing)
    try:
        while job not in select.select([listener, job], [], [])[0]:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError, ValueError):  # the client then starts a worker itself
                client.settimeout(_SECONDS)
                _answer(client, (listener, job), ignored)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.alarm(_SECONDS)  # which ends this process
        with contextlib.suppress(ChildProcessError):  # there is none left
            os.waitpid(-1, 0)
        os._exit(0)


def _answer(client: socket.socket, others: Sequence[socket.socket], ignored: Mapping[int, Any]) -> None:
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    try:
        request = json.loads(b"".join(iter(partial(client.recv, 1 << 16), b"")))
        get_context("fork").Process(target=_work, args=(request, streams, [client, *others], ignored)).start()
        client.sendall(b"\n")
    finally:
        for stream in streams:
            os.close(stream)


def _work(
    request: dict[str, Any], streams: Sequence[int], of_server: Sequence[socket.socket], ignored: Mapping[int, Any]
) -> None:
    """Be the worker that a new process would have been; if that fails before it begins, start that process."""
    for one in of_server:
        one.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, before in ignored.items():  # a new process ignores what its parent ignores, as after `nohup`
        signal.signal(number, signal.SIG_IGN if before is signal.SIG_IGN else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    try:
        os.chdir(request["folder"])
        os.nice(request["nice"] - os.nice(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])
        _forget_job()
        script, *_ = sys.argv = request["arguments"]
        paths = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
        _follow_ray()
    except Exception:  # noqa: BLE001  another version may lack an inner name, and Ray would wait for a worker that is not there
        os.execv(request["command"][0], request["command"])
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _forget_job() -> None:
    """Drop what belongs to the job: what it does at its end, its helper processes, log and streams, and its random numbers."""
    atexit._clear()
    forkserver._forkserver.__init__()  # type: ignore[misc]  # the job's is no child of this process
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders, for example
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    logging.captureWarnings(False)
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    # Python itself sees to `random`.
    for module, function in (("numpy.random", "seed"), ("torch", "seed")):
        if module in sys.modules:
            getattr(sys.modules[module], function)()


def _follow_ray() -> None:
    """Let torch have the threads that Ray allows a task: it sets OMP_NUM_THREADS, which torch reads only when it is imported."""
    utils: Any = import_module("ray._private.utils")
    set_variable: Callable[[], bool] | None = getattr(utils, "set_omp_num_threads_if_unset", None)
    torch = sys.modules.get("torch")
    if set_variable is None or torch is None:
        return
    cores = torch.get_num_threads()

    @wraps(set_variable)
    def set_threads() -> bool:
        is_set: bool = set_variable()
        if is_set:
            torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), cores))
        return is_set

    utils.set_omp_num_threads_if_unset = set_threads
