"""Guards around every test of hostile files: no code of theirs runs, nothing hangs, memory stays bounded."""

import os
import signal
from pathlib import Path

import pytest

MEMORY_LIMIT = 400 << 20
"""Bytes of memory that refusing a file may take beside what the process had."""

PATIENCE_S = 120
"""A file that keeps its reader for longer has hung it."""


class HungError(BaseException):
    """No Exception: readers turn those into refusals."""


@pytest.fixture(autouse=True)
def bounded():
    """The peak of this process is reset before a test, and compared with the limit after it."""

    def hung(*_):
        raise HungError

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(PATIENCE_S)
    start = _reset_peak()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert start is None or _memory("VmHWM") - start < MEMORY_LIMIT


def _reset_peak():
    """Bytes of memory of this process now, from which its peak is counted; None where that cannot be told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


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
