"""Losses, rate and where the time goes, gathered on the device and read a few times an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runtime.progress import duration
from pipeline.training.task import TrainingBatch
from pipeline.training.worker import Worker

POINTS_PER_EPOCH = 50
"""Points of a loss curve per epoch; each is the mean over the steps since the last one, and over all workers."""

BUSY = 0.9
"""Share of the time that forward and backward should span on a GPU."""


class DivergedError(UserError):
    """The loss or its gradient is no longer finite; the message names the batch.

    Attributes:
        step: the first such step.
        keys: of the images of that step, on the worker that found it.
    """

    def __init__(self, message: str, step: int = 0, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step, self.keys = step, list(keys)


def starved(metrics: Mapping[str, float]) -> str:
    """That a GPU waits for data during training, and what helps; "" where something else takes most of its time.

    Args:
        metrics: that :meth:`Meter.read` gave on a GPU, whose shares are then spans on the GPU: from the first kernel of a
            forward or backward to its last one, gaps between kernels included.
    """
    spanned, data = metrics["forward_share"] + metrics["backward_share"], metrics["data_wait_share"]
    if spanned >= BUSY or data < (1 - spanned) / 2:
        return ""
    return (
        f"forward and backward span {spanned:.0%} of the last steps; data takes {data:.0%}: more CPUs a GPU, a smaller "
        "student.input_size, or the cache nearer to it"
    )


class StepTimer:
    """Seconds by part of a step; on a GPU spans between events, which are read when everything before them is done anyway."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[tuple[str, Any, Any]] = []
        self.waited = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        started = self._now()
        yield
        self.laps.append((name, started, self._now()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time that this process waits within, whatever the device does."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading, ``data`` for the waiting; the device must have come to the end."""
        totals = {"data": self.waited, "forward": 0.0, "backward": 0.0}
        for name, start, end in self.laps:
            totals[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.laps, self.waited = [], 0.0
        return totals


class Meter:
    """Metrics of the steps of an epoch.

    Args:
        steps: of the epoch.
        finite_gradient: whether a gradient that is not finite means divergence; in float16 it is no surprise.
    """

    def __init__(self, worker: Worker, steps: int, finite_gradient: bool) -> None:
        self.worker, self.finite_gradient = worker, finite_gradient
        self.every = max(1, steps // POINTS_PER_EPOCH)
        self.clock = StepTimer(worker.device)
        self.pending: list[tuple[list[str], dict[str, Tensor]]] = []
        self.images, self.started = 0, time.perf_counter()
        self.latest: dict[str, float] = {}
        self.seconds_per_step: float | None = None

    def add(self, batches: Sequence[TrainingBatch], parts: dict[str, Tensor]) -> None:
        """A step that was done."""
        keys = [key for batch in batches for key in batch.keys]
        self.pending.append((keys, parts))
        self.images += len(keys)

    @property
    def due(self) -> bool:
        """Whether it is time to :meth:`read`."""
        return len(self.pending) >= self.every

    def read(self, step: int) -> dict[str, float]:
        """Mean metrics of the steps since the last reading, over all workers; empty where there were none.

        Args:
            step: that are done.

        Raises:
            DivergedError: on all workers, where a loss is not finite on one of them.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([parts[name].float() for name in names]) for _, parts in self.pending]).cpu()
        self._check_finite(values, names, step)
        seconds = time.perf_counter() - self.started
        times = self.clock.read()
        # Workers may have unequal shares: losses are weighted by images; times are means over the workers.
        own = torch.cat([values.double().mean(dim=0) * self.images, torch.tensor([*times.values(), seconds]).double()])
        total = self.worker.all_reduce(torch.cat([own, torch.tensor([self.images]).double()]))
        images, seconds = int(total[-1]), float(total[-2]) / self.worker.world
        self.latest = dict(zip(names, (total / images).tolist(), strict=False))
        shares = (total[len(names) : -2] / self.worker.world / seconds).tolist()
        self.latest |= {
            "images_per_second": images / seconds,
            **dict(zip(("data_wait_share", "forward_share", "backward_share"), shares, strict=True)),
        }
        if self.worker.device.type == "cuda":
            self.latest["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.worker.device) / 2**20
        self.seconds_per_step = seconds / len(self.pending)
        self.pending, self.images, self.started = [], 0, time.perf_counter()
        return self.latest

    def _check_finite(self, values: Tensor, names: Sequence[str], step: int) -> None:
        checked = [names.index(name) for name in ("loss", "grad_norm")[: 1 + self.finite_gradient]]
        bad = ~torch.isfinite(values[:, checked]).all(dim=1)
        if not self.worker.any_rank(bool(bad.any())):
            return
        losses = values[:, names.index("loss")]
        # All ranks share the gradient: the rank whose loss is not finite has the cause, at the earliest step.
        bad_loss = ~torch.isfinite(losses)
        found = self._first(bad_loss, losses, step) if bad_loss.any() else None
        if not self.worker.any_rank(found is not None):
            found = self._first(bad, losses, step)
        first, message, keys = self.worker.earliest_failure(found)
        raise DivergedError(message, first, keys)

    def _first(self, bad: Tensor, losses: Tensor, done: int) -> tuple[int, str, list[str]]:
        first = int(bad.nonzero()[0])
        keys, step, loss = self.pending[first][0], done - len(self.pending) + first + 1, losses[first].item()
        message = (
            f"the loss is {loss}{', its gradient not finite,' if math.isfinite(loss) else ''} at step {step}; the batch "
            f"holds {', '.join(keys[:8])} ({len(keys)} images); lower train.lr or train.clip_grad, or look at those images"
        )
        return step, message, keys

    def postfix(self, steps_left: int) -> dict[str, str]:
        """What progress shows beside the count.

        Args:
            steps_left: of the whole run.
        """
        if not self.latest or self.seconds_per_step is None:
            return {}
        return {
            "loss": f"{self.latest['loss']:.3f}",
            "img/s": f"{self.latest['images_per_second']:.0f}",
            "data": f"{self.latest['data_wait_share']:.0%}",
            "run left": duration(steps_left * self.seconds_per_step),
        }
