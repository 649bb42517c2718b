"""The device that teachers run on: one forward after the other, and each thread's other work beside them.

On a GPU a thread works on a CUDA stream of its own. So the codec, the statistics and the copies of one shard run beside
the forward of another, and the next forward is queued while one runs. Forwards share the default stream, whose memory is
used again by each of them: what a GPU must hold does not grow with the number of threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.runtime.interpreter import launch_promptly
from teachers.base import Teacher, TeacherOutput


class TeacherDevice:
    """A device and who has it.

    Args:
        name: ``cuda`` or ``cpu``.
    """

    def __init__(self, name: str) -> None:
        if name == "cuda":
            launch_promptly()
        self.name = name
        self.turn = threading.Lock()
        self.own = threading.local()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What this thread does on the device within runs beside the forwards."""
        if self.name != "cuda":
            yield
            return
        if not hasattr(self.own, "stream"):
            self.own.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.own.stream):
            yield

    def encode(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """What a teacher says of [B, 3, H, W] uint8, ready for any stream, and the seconds that the device took for it."""
        if self.name == "cuda":
            return self._queued(teacher, pixels)
        with self.turn:
            started = time.perf_counter()
            return teacher.encode(pixels), time.perf_counter() - started

    def _queued(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        pixels, copied = pixels.to(self.name), torch.cuda.current_stream()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(
            enable_timing=True, blocking=True
        )  # a thread that waits must not take a core from decoding
        with self.turn, torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda.default_stream().wait_stream(copied)
            start.record()
            output = teacher.encode(pixels)
            end.record()
        end.synchronize()
        return output, start.elapsed_time(end) / 1000
