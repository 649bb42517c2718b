"""Progress with rate and time left: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from pipeline.runtime import logs

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts the work done, in a `unit` such as ``img``, of which `initial` were done before; `clock` is in seconds."""

    def __init__(
        self, total: int, unit: str, label: str, initial: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.initial = self.done = initial
        self.clock = clock
        self.started = self.printed = clock()
        self.first: tuple[float, int] | None = None
        self.postfix: dict[str, Any] = {}
        shown = sys.stderr.isatty() and total > initial
        self.bar = tqdm(total=total, initial=initial, unit=unit, desc=label, leave=True) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done > self.initial:
            self._print()

    def update(self, count: int = 1, **postfix: Any) -> None:
        """Add work done; `postfix` is shown after it."""
        self.done += count
        self.first = self.first or (self.clock(), self.done)
        self.postfix = postfix or self.postfix
        if self.bar is not None:
            self.bar.set_postfix(self.postfix, refresh=False)
            self.bar.update(count)
        elif self.clock() - self.printed >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._print()

    def _print(self) -> None:
        self.printed = self.clock()
        if logs.json_lines():
            log.info(self.line(), extra={"figures": {"done": self.done, "total": self.total, "unit": self.unit}})
        else:
            print(self.line(), flush=True)

    def line(self) -> str:
        """One line: label, count, rate, time left or taken, and the postfix."""
        elapsed = max(self.clock() - self.started, 1e-9)
        rate = (self.done - self.initial) / elapsed
        steady = self._steady_rate()
        left = (self.total - self.done) / steady if steady else float("inf")
        when = f"{duration(elapsed)} total" if self.done >= self.total else f"{duration(left)} left"
        extra = "".join(f"  {name} {value}" for name, value in self.postfix.items())
        return f"{self.label}  {self.done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s  {when}{extra}"

    def _steady_rate(self) -> float:
        """The rate since the first work was done, which came after the start of processes and readers; 0 before there is one."""
        at, done = self.first or (self.started, self.done)
        return (self.done - done) / max(self.clock() - at, 1e-9)


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``; `?` for infinity."""
    if seconds == float("inf"):
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
