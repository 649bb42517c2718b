"""Faults made on purpose: processes that die at a chosen step; and what a cache holds afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.cache.fill.plan import CachePlan
from teachers.base import Teacher, TeacherOptions
from tests.fakes import ColourGrid, fill_in_process

FORK = multiprocessing.get_context("forkserver")
"""Its server imports torch once, so that a process that is to be killed starts in milliseconds."""
FORK.set_forkserver_preload(["pandas", "PIL.JpegImagePlugin", "pipeline.cache.read.reader", "tests.faults"])


def content(cache: Path) -> dict[str, str]:
    """By the path of every listed shard's record, the SHA-256 of its rows, computed from the file itself.

    Asserts that each record says the truth about its file.
    """
    return {str(path.relative_to(cache)): _rows_hash(path) for path in sorted(cache.rglob("shard-*.json"))}


def _rows_hash(path: Path) -> str:
    record = json.loads(path.read_text())
    file = path.with_name(record["file"])
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"], file
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == record["rows"], file
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def listed(cache: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the record and the Parquet files of every listed shard: another of either means it was written again.

    Not of its statistics, which are merged with those of other shards.
    """
    records = [*cache.rglob("shard-*.json")]
    paths = [*records, *(path for record in records for path in record.parent.glob(f"{record.stem}*.parquet"))]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


class Unloadable(ColourGrid):
    """A teacher that must not be asked for its weights."""

    def load(self, device: Any = None, dtype: Any = None) -> None:
        raise AssertionError("loaded")


def unloadable(options: TeacherOptions) -> Teacher:
    """Factory of `Unloadable`, as `tests.faults:unloadable`."""
    return Unloadable(dim=8, log="", delay=0.0, poison=0.0)


def fill_and_die(plan: CachePlan, step: int, lag: float = 0.0) -> None:
    """Fill a planned cache without Ray, in a process that SIGKILLs itself.

    Args:
        step: the write that it dies at: 1 is the first file it opens below the cache, 2 the first that it renames, and so on.
        lag: seconds it lives on from there.
    """
    steps = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in ("open", "os.rename") and str(arguments[0]).startswith(plan.store.uri):
            steps += 1
            if steps == step:
                threading.Timer(lag, _die).start() if lag else _die()

    sys.addaudithook(count)
    fill_in_process(plan)


BLINK = """
import os, shutil, sys
print("begins", flush=True)
while True:
    os.makedirs(sys.argv[1])
    open(sys.argv[1] + "/x", "wb").close()
    shutil.rmtree(sys.argv[1])
"""


@contextlib.contextmanager
def blinking(folder: Path) -> Iterator[None]:
    """Another process makes a folder with a file `x` and removes it, over and over."""
    with subprocess.Popen([sys.executable, "-c", BLINK, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
