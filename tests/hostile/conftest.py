"""Guards around every test of hostile files: no code of theirs runs, nothing hangs, memory stays bounded."""

import os
import signal
from pathlib import Path

import pytest

MEMORY_LIMIT = 400 << 20
"""Bytes of memory that refusing a file may take beside what the process had."""

PATIENCE_S = 120
"""A file that keeps its reader for longer has hung it."""


@pytest.fixture(autouse=True)
def bounded():
    """The peak of this process is reset before, and held against the limit after a test."""

    def hung(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(PATIENCE_S)
    start = _memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        measured = True
    except OSError:
        measured = False  # no Linux, or not allowed
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not measured or _memory("VmHWM") - start < MEMORY_LIMIT


def _memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def harmful(tmp_path):
    """An object that must not be unpickled; at the end nothing has been."""
    marker = tmp_path / "code-was-run"
    yield Harmful(marker)
    assert not marker.exists()
