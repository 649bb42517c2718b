"""Child processes that compute for this one."""

import os
import signal
import threading
from multiprocessing import get_context, parent_process
from multiprocessing.context import ForkServerContext

import torch


def helper_process_context(module: str) -> ForkServerContext:
    """Context for child processes of a process with CUDA or threads, which must not fork; the server preloads `module`."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def init_helper_process() -> None:
    """Initialise a child process: one torch thread, Ctrl-C left to the parent, exit when the parent has exited.

    Waits for the parent itself: a pipe would not reach its end, because siblings inherit and hold its other end.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
