"""Freed memory stays with the process, and another C library is no error."""

import ctypes
import platform
import subprocess
import sys

import pytest

from pipeline.runtime import allocator
from tests.conftest import REPOSITORY

PROBE = """
import sys, torch
from pathlib import Path
from pipeline.runtime.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
block = torch.ones(256 << 20, dtype=torch.uint8)
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_block_that_was_freed_is_still_there():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", PROBE, how], cwd=REPOSITORY, capture_output=True, check=True).stdout)
        for how in ("keep", "as it is")
    )
    assert kept > 250
    assert given_back < 50


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory()
