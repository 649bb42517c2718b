"""Losses, rate and shares of the time, accumulated on the device and read a few times per epoch."""

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
"""Points of a loss curve per epoch; each is the mean over all workers and the steps since the previous one."""

BUSY = 0.9
"""Share of the time that forward and backward should take on a GPU."""


class DivergedError(UserError):
    """The loss or its gradient is not finite, first at `step`, on the images with these `keys` of one worker's batch."""

    def __init__(self, message: str, step: int = 0, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step, self.keys = step, list(keys)


def data_bound(metrics: Mapping[str, float]) -> str:
    """A warning, with the remedy, if a GPU mostly waits for data; else "".

    In `metrics` of :meth:`Meter.read` on a GPU, a share of forward or backward spans its first to its last kernel.
    """
    spanned, data = metrics["forward_share"] + metrics["backward_share"], metrics["data_wait_share"]
    if spanned >= BUSY or data < (1 - spanned) / 2:
        return ""
    return (
        f"forward and backward span {spanned:.0%} of the last steps; data takes {data:.0%}: more CPUs a GPU, a smaller "
        "student.input_size, or the cache nearer to it"
    )


class StepTimer:
    """Seconds by part of a step; on a GPU between CUDA events, which need no extra synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[tuple[str, Any, Any]] = []
        self.waited = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of a step."""
        started = self._now()
        yield
        self.laps.append((name, started, self._now()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time how long this process waits for data, on the host's clock."""
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
        """Seconds by part, and waiting as ``data``, since the last reading; the device must be synchronised."""
        totals = {"data": self.waited, "forward": 0.0, "backward": 0.0}
        for name, start, end in self.laps:
            totals[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.laps, self.waited = [], 0.0
        return totals


class Pace:
    """Seconds per step of a run, for the time left: a mean in which later readings count more.

    The first reading holds the start of readers and kernels, and gives way to the second.
    """

    LEAST_WEIGHT = 0.1
    """Weight of a reading after many."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.readings = 0

    def add(self, seconds: float) -> None:
        """Add a reading."""
        weight = max(self.LEAST_WEIGHT, 1 / max(1, self.readings))
        self.seconds = seconds if self.seconds is None else self.seconds + weight * (seconds - self.seconds)
        self.readings += 1


class Meter:
    """Metrics of the steps of an epoch.

    Args:
        pace: of the run, which readings are added to.
        finite_gradient: whether a gradient that is not finite means divergence; in float16 it is expected.
    """

    def __init__(self, worker: Worker, steps: int, pace: Pace, finite_gradient: bool) -> None:
        self.worker, self.pace, self.finite_gradient = worker, pace, finite_gradient
        self.every = max(1, steps // POINTS_PER_EPOCH)
        self.clock = StepTimer(worker.device)
        self.pending: list[tuple[list[str], dict[str, Tensor]]] = []
        self.images, self.started = 0, time.perf_counter()
        self.latest: dict[str, float] = {}
        self.seconds_per_step: float | None = None

    def add(self, batches: Sequence[TrainingBatch], parts: dict[str, Tensor]) -> None:
        """Add a finished step."""
        keys = [key for batch in batches for key in batch.keys]
        self.pending.append((keys, parts))
        self.images += len(keys)

    @property
    def due(self) -> bool:
        """Whether it is time to :meth:`read`."""
        return len(self.pending) >= self.every

    def read(self, step: int) -> dict[str, float]:
        """Mean metrics over all workers and the steps since the last reading; empty without steps.

        Args:
            step: number of steps done in the run.

        Raises:
            DivergedError: on all workers, if the loss or gradient of one of them is not finite.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([parts[name].float() for name in names]) for _, parts in self.pending]).cpu()
        self._check_finite(values, names, step)
        seconds = time.perf_counter() - self.started
        times = self.clock.read()
        # workers may have unequal shares: losses are weighted by images, times averaged over the workers
        own = torch.cat([values.double().mean(dim=0) * self.images, torch.tensor([*times.values(), seconds]).double()])
        total = self.worker.all_reduce(torch.cat([own, torch.tensor([self.images]).double()]))
        images, seconds = int(total[-1]), float(total[-2]) / self.worker.world
        shares = (total[len(names) : -2] / self.worker.world / seconds).tolist()
        self.latest = {
            **dict(zip(names, (total / images).tolist(), strict=False)),
            "images_per_second": images / seconds,
            **dict(zip(("data_wait_share", "forward_share", "backward_share"), shares, strict=True)),
        }
        if self.worker.device.type == "cuda":
            self.latest["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.worker.device) / 2**20
        self.seconds_per_step = seconds / len(self.pending)
        self.pace.add(self.seconds_per_step)
        self.pending, self.images, self.started = [], 0, time.perf_counter()
        return self.latest

    def _check_finite(self, values: Tensor, names: Sequence[str], step: int) -> None:
        checked = [names.index(name) for name in ("loss", "grad_norm")[: 1 + self.finite_gradient]]
        bad = ~torch.isfinite(values[:, checked]).all(dim=1)
        if not self.worker.any_rank(bool(bad.any())):
            return
        losses = values[:, names.index("loss")]
        # all ranks share the gradient: the cause is on the rank whose loss is not finite, at the earliest step
        bad_loss = ~torch.isfinite(losses)
        if self.worker.any_rank(bool(bad_loss.any())):
            bad = bad_loss
        found = self._first(bad, losses, step) if bad.any() else None
        first, message, keys = min(failure for failure in self.worker.all_gather_objects([found]) if failure)
        raise DivergedError(message, first, keys)

    def _first(self, bad: Tensor, losses: Tensor, done: int) -> tuple[int, str, list[str]]:
        first = int(bad.nonzero()[0])
        keys, step, loss = self.pending[first][0], done - len(self.pending) + first + 1, losses[first].item()
        message = (
            f"the loss is {loss}{', its gradient not finite,' if math.isfinite(loss) else ''} at step {step}; the batch "
            f"holds {', '.join(keys[:8])} ({len(keys)} images); lower train.lr or train.clip_grad, or inspect those images"
        )
        return step, message, keys

    def postfix(self, steps_left: int) -> dict[str, str]:
        """Figures for the progress line; `steps_left` counts to the end of the run."""
        if not self.latest or self.pace.seconds is None:
            return {}
        return {
            "loss": f"{self.latest['loss']:.3f}",
            "img/s": f"{self.latest['images_per_second']:.0f}",
            "data": f"{self.latest['data_wait_share']:.0%}",
            "run left": duration(steps_left * self.pace.seconds),
        }
