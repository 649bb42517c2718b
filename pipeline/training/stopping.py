"""SIGTERM and Ctrl-C during a training."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def call_in_thread(call: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own and wait, so that Ctrl-C is a KeyboardInterrupt here at once.

    In the main thread, Ray Train installs a handler of its own, which waits for the workers and then exits with code 1.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            outcome.set_exception(error)

    threading.Thread(target=copy_context().run, args=(work,), daemon=True).start()
    return outcome.result()


@contextmanager
def on_sigterm(act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` on the first SIGTERM; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        print("SIGTERM: saving a checkpoint, then stopping", flush=True)
        act()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
