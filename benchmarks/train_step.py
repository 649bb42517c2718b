"""Measure the cost of a training step beyond the student itself: cached teachers, online teachers, and Ray Train.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --batch-size 256 --images 8192 --threads 14 --steps 20 --online-images 16
    python benchmarks/train_step.py --ray --no-online

A step is forward, backward, clipping, AdamW and weight average of ReGLA, with features of teachers in their real shapes
(DINOv2-S, CLIP-B, SAM-B). Kinds of steps run in interleaved blocks; the first steps of a block warm up. Features are stored
with the cache's default codec. Their values are noise, which cannot be compressed, so reading costs more than in a real cache.
Neither side augments images.

    student     the student alone on images in device memory; its loss is the mean square of its outputs
    in memory   student, heads and losses on a batch in device memory, with encoded features
    cached      the same on batches that are read, joined and decoded during the previous step

`cached_over_student` and `cached_over_in_memory` are medians over the rounds of the ratio within a round. `online` is a step in
memory plus the forward passes of all teachers, with random weights, on the same device; images are resized beforehand, and
the time of `--online-images` is scaled to the batch. `--ray` runs equal epochs in this process and under Ray Train, interleaved.
Prints a table and one line of JSON.

`operators_over_student` counts computing operators of a step in memory that is not compiled, relative to those of the student
alone. On a GPU each launches at least one kernel, and launches are what limits a small student; `gpu_student` and `gpu_cached`
hold what a step in memory launches there, by torch.profiler.

On a CPU `cpu_time` gives the same ratios of processor time of the whole process: trust these if other programs share the cores.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work if others use the cores

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.roofline import operators
from benchmarks.synthetic_cache import jpegs, write_dataset, write_features
from pipeline.cache.config import CacheConfig, TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.distill.config import LossConfig
from pipeline.distill.distiller import Distiller
from pipeline.distill.standardise import neutral_standardiser
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.student.model import Encoder, Student, create_backbone
from pipeline.training.config import TrainConfig
from pipeline.training.loop import prefetch_to_device, train
from pipeline.training.meter import StepTimer
from pipeline.training.ray_train import fit
from pipeline.training.step import Stepper
from pipeline.training.task import Task, to_device
from pipeline.training.worker import Worker
from teachers.base import Teacher

TEACHERS = ("dinov2/vits14", "clip/ViT-B-16", "sam/vit_b")
WARM_UP = 2
"""Steps of a block that are not measured: in them the reader fills its queue."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.cuda_graphs:
        inductor_config.triton.cudagraphs = True
    with TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        figures = bench.measure()
        if options.ray:
            figures |= ray_over_bare(bench, folder)
    described = {name: getattr(options, name) for name in ("student", "image_size", "device", "compile", "cuda_graphs")}
    print(json.dumps({**figures, **described}))


class DistillStep(Task):
    """The loss of `DistillTask` without augmentation, `steps` times an epoch on the same batch."""

    def __init__(self, module: nn.Module, batch: Batch | None = None, steps: int = 0) -> None:
        self.module, self.epoch, self.step = module, [batch] * steps, 0

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Task.loss`."""
        step = torch.tensor(self.step).to(device, non_blocking=True)
        self.step += 1
        return module(batch.images, batch.features, step=step)

    def steps(self, epoch: int) -> int:
        """See :meth:`Task.steps`."""
        return len(self.epoch)

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """See :meth:`Task.batches`."""
        return iter(self.epoch[start:])

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Nothing."""
        return {}


class StudentStep(DistillStep):
    """The student alone; its loss is the mean square of summary and tokens."""

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Task.loss`."""
        summary, tokens = module(batch.images)
        return summary.float().square().mean() + tokens.float().square().mean(), {}


class TimedStep(DistillStep):
    """Writes the starting times of all steps, [clock, processor] in seconds, to `file` after each epoch."""

    file: Path
    starts: list[list[float]]

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Task.loss`."""
        self.starts.append([time.perf_counter(), time.process_time()])
        return super().loss(module, batch, device)

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Write the times."""
        self.file.write_text(json.dumps(self.starts))
        return {}


class Bench:
    """A cache, and a stepper for each kind of step."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.jpegs = jpegs(options.image_size)
        self.dataset = write_dataset(f"{folder}/cache", options.images, self.jpegs, -(-options.images // 4))
        self.teachers = [write_features(self.dataset, model, options.codec) for model in options.teachers]
        self.reader, self.epoch = make_reader(options, self.dataset, self.teachers), 0
        self.batch = to_device(next(self.reader.batches(0)), self.device)
        student, distiller = make_student(options.student), make_distiller(options, self.teachers)
        tasks = {"student": StudentStep(student), "cached": DistillStep(distiller)}
        worker = Worker(device=self.device)
        self.steppers = {
            name: Stepper(task, train_config(options), worker, [1_000_000]) for name, task in tasks.items()
        }

    def measure(self) -> dict[str, Any]:
        """Ratios between the kinds of steps, measured in interleaved blocks."""
        online = self.options.online
        rendered = [self._render(model) for model in self.options.teachers] if online else []
        ways: dict[str, Callable[[], np.ndarray]] = {
            "student": lambda: self._block("student", repeat(self.batch)),
            "in memory": lambda: self._block("cached", repeat(self.batch)),
            "cached": self._block_of_reader,
            **({"teachers": lambda: self._encode(rendered)} if online else {}),
        }
        rounds = [{name: way() for name, way in ways.items()} for _ in range(self.options.rounds)]
        times = {name: np.array([found[name] for found in rounds]) for name in ways}  # each [rounds, 2]
        if online:
            times["online"] = times["in memory"] + times["teachers"]
        print(f"{'step':<12}{'ms':>10}{'over student':>15}{'CPU ms':>12}{'over student':>15}")
        for name, measured in times.items():
            pairs = zip(1000 * np.median(measured, 0), np.median(measured / times["student"], 0), strict=True)
            print(f"{name:<12}" + "  ".join(f"{milliseconds:>10.1f}{over:>15.3f}" for milliseconds, over in pairs))
        compared = [("cached", "student"), ("cached", "in memory"), ("in memory", "student")]
        clock: dict[str, Any] = {}
        processor: dict[str, float] = {}
        for way, base in [*compared, *([("online", "cached")] if online else [])]:
            name = f"{way}_over_{base}".replace(" ", "_")
            clock[name], processor[name] = np.median(times[way] / times[base], 0).round(3).tolist()
        student, distilled = map(self._count_operators, ("student", "cached"))
        print(f"operators of a step: {student} of the student alone, {distilled} with heads and losses")
        clock["operators_over_student"] = round(distilled / student, 3)
        if self.device.type == "cpu":
            return {**clock, "cpu_time": processor}
        clock["milliseconds"] = {name: _milliseconds(found) for name, found in times.items()}
        return {**clock, **{f"gpu_{name}": self._profile(name) for name in self.steppers}}

    def _count_operators(self, name: str) -> int:
        with operators() as found:
            self.step(name)
        return len(found)

    def _profile(self, name: str) -> dict[str, float]:
        """Launches, kernels and their milliseconds in a step on the GPU."""
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            self.step(name)
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
        launches = sum("Launch" in event.name for event in profile.events() if event.device_type == DeviceType.CPU)
        milliseconds = sum(kernel.self_device_time_total for kernel in kernels) / 1e3
        return {"launches": launches, "kernels": len(kernels), "milliseconds": round(milliseconds, 2)}

    def step(self, name: str) -> None:
        """One optimiser step of a kind of `steppers` on the batch in memory."""
        self.steppers[name]([self.batch], WARM_UP + self.options.steps, StepTimer(self.device))

    def _block(self, name: str, batches: Iterator[Batch]) -> np.ndarray:
        """Times of a step, as those of `_now`."""
        stepper, clock, started = self.steppers[name], StepTimer(self.device), np.zeros(2)
        stepper.wrapped.train()
        for step in range(WARM_UP + self.options.steps):
            if step == WARM_UP:
                started = _now()
            stepper([next(batches)], step, clock)
        return (_now() - started) / self.options.steps

    def _block_of_reader(self) -> np.ndarray:
        with closing(self._read()) as batches:
            times = self._block("cached", batches)
        gc.collect()  # the reader's threads end with its generator
        return times

    def _read(self) -> Generator[Batch]:
        while True:
            self.epoch += 1
            yield from prefetch_to_device(self.reader.batches(self.epoch), self.device)

    def _render(self, model: str) -> tuple[Teacher, Tensor]:
        """A teacher with random weights, and some images at its own size."""
        teacher = make_teacher(TeacherConfig(model=model, weights="random"))
        teacher.load(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        size, interpolation = teacher.spec.input_size, teacher.spec.interpolation
        images = (decode_image(data) for data in islice(cycle(self.jpegs), self.options.online_images))
        pixels = np.stack([crop_and_resize(image, FULL, size, interpolation) for image in images])
        return teacher, torch.from_numpy(pixels)

    def _encode(self, rendered: Sequence[tuple[Teacher, Tensor]]) -> np.ndarray:
        """Times of all teachers for a batch."""
        started = _now()
        for teacher, pixels in rendered:
            teacher.encode(pixels)
        return (_now() - started) / self.options.online_images * self.options.batch_size


def _milliseconds(times: np.ndarray) -> float:
    """Median by the clock of times [rounds, 2] in seconds."""
    return round(float(1e3 * np.median(times[:, 0])), 2)


def _now() -> np.ndarray:
    """Seconds [2] by the clock and of the processor, when the GPU has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def make_reader(
    options: argparse.Namespace, dataset: Dataset, teachers: Sequence[CachedTeacher]
) -> CacheReader | ReaderProcess:
    """A reader, as training on the device has it."""
    make = ReaderProcess if options.device == "cuda" else CacheReader
    how = {"batch_size": options.batch_size, "window": 256, "threads": max(2, options.threads)}
    return make(dataset, teachers, image_size=options.image_size, **how)


def train_config(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    """Of the steps."""
    settings = {"batch_size": options.batch_size, "precision": options.precision, "compile": options.compile}
    return TrainConfig(**settings, **changes)


def make_student(name: str) -> Student:
    """A student with seeded random weights."""
    torch.manual_seed(0)
    return Student(Encoder(create_backbone(name)), 256)


def make_distiller(options: argparse.Namespace, teachers: Sequence[CachedTeacher]) -> Distiller:
    """Student, heads and losses, with targets that need no standardising."""
    standardisers = {
        teacher.id: {kind: neutral_standardiser("mean_std", shape[-1]) for kind, shape in teacher.shapes.items()}
        for teacher in teachers
    }
    codecs = {teacher.id: teacher.codecs() for teacher in teachers}
    student, loss = make_student(options.student), LossConfig(max_patches=options.max_patches)
    return Distiller(student, teachers, standardisers, codecs, options.image_size, options.head_dim, loss)


def make_timed_step(payload: dict[str, Any], rank: int, world: int) -> TimedStep:
    """Build the task, in a worker of Ray Train or in this process."""
    options, dataset, teachers = (payload[name] for name in ("options", "dataset", "teachers"))
    batch = next(make_reader(options, dataset, teachers).batches(0))
    task = TimedStep(make_distiller(options, teachers), batch, options.ray_steps)
    task.file, task.starts = payload["file"], []
    return task


def ray_over_bare(bench: Bench, folder: str) -> dict[str, float]:
    """Median time between the starts of two steps under Ray Train, over that in this process."""
    from pipeline.runtime.ray_session import connect

    file, config = Path(folder, "times.json"), train_config(bench.options, epochs=1, workers=1)
    payload = {"options": bench.options, "dataset": bench.dataset, "teachers": bench.teachers, "file": file}

    def bare(_: int) -> None:
        train(make_timed_step(payload, 0, 1), config, Worker(device=bench.device), None, lambda _: None)

    def ray(number: int) -> None:
        fit(make_timed_step, payload, config, f"{folder}/ray-{number}", lambda *_: None)

    def times(run: Callable[[int], None], number: int) -> np.ndarray:
        run(number)
        starts = np.array(json.loads(file.read_text()))
        return np.median(np.diff(starts[WARM_UP:], axis=0), axis=0)

    with connect():
        pairs = np.array([[times(run, number) for run in (bare, ray)] for number in range(bench.options.ray_rounds)])
    print("ms a step, bare and under Ray Train, by the clock and of the processor:")
    print((1000 * pairs).round(1).tolist())
    clock, processor = np.median(pairs[:, 1] / pairs[:, 0], axis=0).round(3).tolist()
    return {"ray_over_bare": clock, "ray_over_bare_cpu_time": processor}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="regla_m")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=1024, help="hidden channels of the heads")
    parser.add_argument(
        "--max-patches", type=int, default=LossConfig().max_patches, help="as loss.max_patches of the configuration"
    )
    parser.add_argument("--images", type=int, default=512, help="in the cache")
    parser.add_argument("--codec", default=CacheConfig().codec, help="as cache.codec of the configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true", help="with --compile: replay a step's kernels as graphs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--online", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--online-images", type=int, default=1, help="that the teachers encode in a round")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--ray-steps", type=int, default=16, help="steps of an epoch under Ray Train and without")
    parser.add_argument("--ray-rounds", type=int, default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
