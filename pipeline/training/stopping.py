"""How a run is told to save and to end: a file beside the checkpoints, which SIGTERM writes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyarrow import fs

STOP_FILE = "stop"


class StopFile:
    """Tells workers wherever they are to stop, through the folder that they all see.

    Args:
        filesystem, path: of the file.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path

    def write(self, reason: str = "") -> None:
        """Ask them to."""
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(reason.encode())

    def read(self) -> str:
        """Why they are asked to."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return str(stream.read().decode())

    def exists(self) -> bool:
        """Whether they are asked to."""
        there: bool = self.filesystem.get_file_info(self.path).type == fs.FileType.File
        return there

    def remove(self) -> None:
        """Ask no longer."""
        if self.exists():
            self.filesystem.delete_file(self.path)


@contextmanager
def on_sigterm(act: Callable[[], Any]) -> Iterator[None]:
    """What the first SIGTERM does; a second one ends the process as usual."""
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
