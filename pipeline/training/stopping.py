"""Files that tell all workers something, and SIGTERM, which writes the one that stops a run after a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

STOP_FILE = "stop"


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
