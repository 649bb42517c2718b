"""Resident memory of this process and its descendants over time; Linux only."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from tests.processes import descendants, read_proc

PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20

Curves = dict[str, list[tuple[float, float]]]
"""(seconds, MiB) by process."""


@contextmanager
def watch_memory(this: str, below: dict[str, str] | None = None, interval: float = 0.5) -> Iterator[Curves]:
    """Sample every `interval` seconds while the block runs.

    Args:
        this: label of this process.
        below: labels of descendants by a part of their titles; processes with the same label are summed.
    """
    curves: Curves = defaultdict(list)
    done = threading.Event()

    def sample() -> None:
        started = time.perf_counter()
        while not done.wait(interval):
            sums: defaultdict[str, float] = defaultdict(float, {this: _resident_mib(os.getpid())})
            for pid, title in (descendants(os.getpid()) if below else {}).items():
                for label in {label for part, label in (below or {}).items() if part in title}:
                    sums[label] += _resident_mib(pid)
            for label, mib in sums.items():
                curves[label].append((time.perf_counter() - started, mib))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield curves
    finally:
        done.set()
        thread.join()


def report(curves: Curves, figure: Path, title: str) -> dict[str, dict[str, float]]:
    """Plot the curves; print and return mean MiB of the second and the last quarter, and the peak, by process.

    The first quarter is start and warm-up.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 3.5), layout="constrained")
    axes = canvas.add_subplot()
    means = {}
    print(f"{'resident memory, MiB':<28}{'2nd quarter':>13}{'last quarter':>14}{'peak':>8}")
    for label, points in curves.items():
        seconds, mib = zip(*points, strict=True)
        axes.plot(seconds, mib, label=label)
        quarter = max(1, len(mib) // 4)
        second, last, peak = fmean(mib[quarter : 2 * quarter] or mib), fmean(mib[-quarter:]), max(mib)
        print(f"{label:<28}{second:>13.1f}{last:>14.1f}{peak:>8.0f}")
        means[label] = {"second_quarter": round(second, 1), "last_quarter": round(last, 1), "peak": round(peak, 1)}
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", title=title, ylim=(0, None))
    axes.legend(loc="lower right")
    figure.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(figure, dpi=110)
    return means


def growth(means: dict[str, dict[str, float]]) -> float:
    """Largest growth of a process: its last quarter over its second."""
    return round(max(part["last_quarter"] / part["second_quarter"] for part in means.values()), 3)


def _resident_mib(pid: int) -> float:
    return int((read_proc(pid, "statm").split() or ["0", "0"])[1]) * PAGE_MIB
