"""The device that teachers run on: forwards one after the other, and every thread's other work in parallel.

On a GPU each thread has a CUDA stream of its own, so that the codec, statistics and copies of one shard overlap the forward
of another, and the next forward is queued while one runs. Forwards share the default stream and so reuse its memory: the
GPU memory needed does not grow with the number of threads.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.runtime.interpreter import launch_promptly
from teachers.base import Teacher, TeacherOutput


class TeacherDevice:
    """The device ``cuda`` or ``cpu``, with a lock for the forwards."""

    def __init__(self, name: str) -> None:
        if name == "cuda":
            launch_promptly()
        self.name = name
        self.forward_lock = threading.Lock()
        self.local = threading.local()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """In this block, the thread's work on the device overlaps the forwards."""
        if self.name != "cuda":
            yield
            return
        if not hasattr(self.local, "stream"):
            self.local.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.local.stream):
            yield

    def encode(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """A teacher's output for [B, 3, H, W] uint8 pixels, ready for any stream, and the seconds that the device took."""
        if self.name == "cuda":
            return self._encode_on_gpu(teacher, pixels)
        with self.forward_lock:
            started = time.perf_counter()
            return teacher.encode(pixels), time.perf_counter() - started

    def _encode_on_gpu(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        pixels, copied = pixels.to(self.name), torch.cuda.current_stream()
        start = torch.cuda.Event(enable_timing=True)
        # A blocking event: a waiting thread must not take a core from decoding.
        end = torch.cuda.Event(enable_timing=True, blocking=True)
        with self.forward_lock, torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda.default_stream().wait_stream(copied)
            start.record()
            output = teacher.encode(pixels)
            end.record()
        end.synchronize()
        return output, start.elapsed_time(end) / 1000
