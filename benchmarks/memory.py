"""Resident memory of this process and of those below it, over time."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import psutil

INTERVAL_S = 0.25

Curves = dict[str, list[tuple[float, float]]]
"""By process, (seconds, MiB)."""


@contextmanager
def watch(names: dict[str, str] | None = None) -> Iterator[Curves]:
    """Sample while the block runs.

    Args:
        names: label by a part of the title of a process below this one; those of one label are added up.
    """
    curves: Curves = defaultdict(list)
    done = threading.Event()

    def sample() -> None:
        started, me = time.perf_counter(), psutil.Process()
        while not done.wait(INTERVAL_S):
            sums: dict[str, float] = {"this process": _mib(me)}
            for child in me.children(recursive=True) if names else ():
                title = _title(child)
                for part, label in (names or {}).items():
                    if part in title:
                        sums[label] = sums.get(label, 0.0) + _mib(child)
            for label, mib in sums.items():
                curves[label].append((time.perf_counter() - started, mib))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield curves
    finally:
        done.set()
        thread.join()


def _mib(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 2**20
    except psutil.Error:
        return 0.0  # it has ended since it was listed


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def report(curves: Curves, figure: Path, title: str) -> dict[str, dict[str, float]]:
    """Draw the curves, print and return the means of the first and of the last quarter in MiB, by process."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 4), layout="constrained")
    axes = canvas.add_subplot()
    means = {}
    print(f"{'resident memory, MiB':<24}{'first quarter':>15}{'last quarter':>15}{'peak':>10}")
    for label, points in curves.items():
        seconds, mib = zip(*points, strict=True)
        axes.plot(seconds, mib, label=label)
        quarter = max(1, len(mib) // 4)
        means[label] = {"first_quarter": round(fmean(mib[:quarter]), 1), "last_quarter": round(fmean(mib[-quarter:]), 1)}
        print(f"{label:<24}{means[label]['first_quarter']:>15}{means[label]['last_quarter']:>15}{max(mib):>10.0f}")
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", title=title, ylim=(0, None))
    axes.legend()
    figure.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(figure, dpi=120)
    return means
