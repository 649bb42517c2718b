"""How long a training will take, before it starts: the student's forward and backward are timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.distill.config import DistillJobConfig
from pipeline.distill.phases import Phase
from pipeline.distill.task import build_student
from pipeline.training.step import autocast_dtype

CPU_IMAGES = 8
"""Images of a timed step on a CPU, where larger ones take seconds and are no faster an image."""


@dataclass(frozen=True)
class TrainingEstimate:
    """How long the training of a phase takes.

    Attributes:
        images: that the student will see in all epochs; None: the number of training images is not known.
        images_per_second: of the student alone, on one device: its forward and backward. Heads, losses and optimiser come on
            top; reading is hidden behind them.
        device: name of the GPU, or ``cpu``.
    """

    images: int | None
    images_per_second: float
    device: str

    def hours(self, workers: int) -> float | None:
        """Hours on so many devices; None if the number of images is not known."""
        return None if self.images is None else self.images / self.images_per_second / workers / 3600


def estimate_training(phase: Phase, timer: Callable[[DistillJobConfig], tuple[float, str]]) -> TrainingEstimate:
    """The estimate of a phase; `timer` is one of the functions below."""
    config = phase.settled
    batch, train = config.train.batch_size, phase.plan.split("train")
    known = train is not None and train.is_estimated
    images = phase.views // batch * batch * config.train.epochs if known else None
    rate, device = timer(config)
    seconds = (1 - sum(found.share for found in config.resolutions)) / rate
    seconds += sum(found.share / timer(config.at_resolution(found))[0] for found in config.resolutions)
    return TrainingEstimate(images, 1 / seconds, device)


def time_student(config: DistillJobConfig) -> tuple[float, str]:
    """Images per second of a forward and backward on this machine, the second of two, and the device.

    Random pixels take as long as images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = build_student(config).to(device).to(memory_format=torch.channels_last).train()
    side, dtype = config.student.input_size, autocast_dtype(config.train, device)
    most = config.train.micro_batch or config.train.batch_size
    count = most if device.type == "cuda" else min(most, CPU_IMAGES)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = student(pixels)
            loss = sum(part.float().square().mean() for part in output)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return count / seconds, torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def time_on_cluster(config: DistillJobConfig) -> tuple[float, str]:
    """The same on one of the cluster's GPUs, once one is free."""
    import ray

    return ray.get(ray.remote(num_gpus=1)(time_student).remote(config))
