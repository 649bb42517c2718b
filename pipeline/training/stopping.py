"""Files that tell all workers something, and SIGTERM, which writes the one that stops a run after a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from pyarrow import fs

STOP_FILE = "stop"

Result = TypeVar("Result")


@dataclass(frozen=True)
class SharedFile:
    """A small file in a folder that all workers see."""

    filesystem: fs.FileSystem
    path: str

    def write(self, text: str = "") -> None:
        """Write it, or overwrite it."""
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(text.encode())

    def read(self) -> str:
        """Its text."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return str(stream.read().decode())

    def exists(self) -> bool:
        """Whether it exists."""
        there: bool = self.filesystem.get_file_info(self.path).type == fs.FileType.File
        return there

    def remove(self) -> None:
        """Delete it, if it exists."""
        if self.exists():
            self.filesystem.delete_file(self.path)


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
