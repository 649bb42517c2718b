"""Measure the cost of a training step beyond the student itself: cached teachers, online teachers, and Ray Train.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --batch-size 256 --images 8192 --threads 14 --steps 20 --online-images 16
    python benchmarks/train_step.py --ray --no-online

A step is forward, backward, clipping, AdamW and weight average of ReGLA, with features of three teachers in their real shapes
(DINOv2-S, CLIP-B, SAM-B). Kinds of steps run in interleaved blocks; the first steps of a block warm up. Features are stored
with the cache's default codec. Their values are noise, which cannot be compressed, so reading costs more than in a real cache.
Neither side augments images.

    student     the student alone on images in device memory; its loss is the mean square of its outputs
    in memory   student, heads and losses on a batch in device memory, with encoded features
    cached      the same on batches that are read, joined and decoded during the previous step

`cached_over_student` and `cached_over_in_memory` are medians over the rounds of the ratio within a round. `online` is a step in
memory plus the forward passes of all three teachers, with random weights, on the same device; images are resized beforehand, and
the time of `--online-images` is scaled to the batch. `--ray` runs equal epochs in this process and under Ray Train, interleaved.
Prints a table and one line of JSON.

`operators_over_student` counts computing operators of a step in memory, relative to those of the student alone. On a GPU each
launches at least one kernel, and launches are what limits a small student.

On a CPU `cpu_time` gives the same ratios of processor time of the whole process: trust these if other programs share the cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that wait count as work, where others have the cores

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.synthetic_cache import commit_features, jpegs, write_dataset
from pipeline.cache.config import CacheConfig, TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.distill.config import LossConfig
from pipeline.distill.distiller import Distiller
from pipeline.distill.standardise import MeanStd
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.student.model import Encoder, Student, create_backbone
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.meter import StepTimer
from pipeline.training.ray_train import fit
from pipeline.training.step import Stepper
from pipeline.training.task import Task
from pipeline.training.upload import prefetch_to_device, to_device
from pipeline.training.worker import Worker
from teachers.base import Teacher

TEACHERS = ("dinov2/vits14", "clip/ViT-B-16", "sam/vit_b")
Times = np.ndarray
"""Seconds [2] by the clock, and of the processor."""
WARM_UP = 2
"""Steps of a block that are not measured: in them the reader fills its queue."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        figures = bench.measure()
        if options.ray:
            figures |= ray_over_bare(options, folder)
    print(
        json.dumps({**figures, "student": options.student, "image_size": options.image_size, "device": options.device})
    )


class DistillStep(Task):
    """The distillation loss of a batch, as `DistillTask` computes it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.step = module, 0

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `DistillTask`, without augmentation."""
        step = torch.tensor(self.step).to(device, non_blocking=True)
        self.step += 1
        result: tuple[Tensor, dict[str, Tensor]] = module(batch.images, batch.features, step=step)
        return result

    def steps(self, epoch: int) -> int:
        """Any number: nothing here depends on it."""
        return 1_000_000

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """None."""
        return iter(())

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Nothing."""
        return {}


class StudentStep(DistillStep):
    """The student alone."""

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean square of summary and tokens."""
        summary, tokens = module(batch.images)
        return summary.float().square().mean() + tokens.float().square().mean(), {}


class Operators(TorchDispatchMode):
    """Counts operators that compute something; views do not."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of one operator."""
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


class Bench:
    """A cache, and a stepper for each kind of step."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.jpegs = jpegs(options.image_size)
        self.dataset = write_dataset(f"{folder}/cache", options.images, self.jpegs, -(-options.images // 4))
        self.teachers = [write_features(self.dataset, model, options.codec) for model in TEACHERS]
        self.reader = self._reader()
        self.batch = to_device(next(self.reader.batches(0)), self.device)
        config = train_config(options)
        self.steppers = {
            name: Stepper(task, config, Worker(device=self.device), [1_000_000])
            for name, task in (
                ("student", StudentStep(make_student(options.student))),
                ("cached", DistillStep(make_distiller(options, self.teachers))),
            )
        }
        self.epoch = 0

    def _reader(self) -> CacheReader | ReaderProcess:
        options = self.options
        make = ReaderProcess if options.device == "cuda" else CacheReader
        return make(
            self.dataset,
            self.teachers,
            image_size=options.image_size,
            batch_size=options.batch_size,
            window=256,
            threads=max(2, options.threads),
        )

    def measure(self) -> dict[str, Any]:
        """Ratios between the kinds of steps, measured in interleaved blocks."""
        ways: dict[str, Callable[[], Times]] = {
            "student": lambda: self._block("student", repeat(self.batch)),
            "in memory": lambda: self._block("cached", repeat(self.batch)),
            "cached": lambda: self._block("cached", self._read()),
        }
        if self.options.online:
            loaded = [load_teacher(model, self.device) for model in TEACHERS]
            ways["teachers"] = partial(self._encode, [(teacher, self._rendered(teacher)) for teacher in loaded])
        rounds = [{name: way() for name, way in ways.items()} for _ in range(self.options.rounds)]
        if self.options.online:
            for found in rounds:
                found["online"] = found["in memory"] + found["teachers"]
        print(f"{'step':<12}{'ms':>10}{'over student':>15}{'CPU ms':>12}{'over student':>15}")
        for name in rounds[0]:
            row = [f"{name:<12}"]
            for kind in (0, 1):
                over = median(found[name][kind] / found["student"][kind] for found in rounds)
                milliseconds = 1000 * median(found[name][kind] for found in rounds)
                row.append(f"{milliseconds:>10.1f}{over:>15.3f}")
            print("  ".join(row), flush=True)
        clock, processor = (self._ratios(rounds, kind) for kind in (0, 1))
        student, distilled = map(self._operators, ("student", "cached"))
        print(f"operators of a step: {student} of the student alone, {distilled} with heads and losses")
        clock["operators_over_student"] = round(distilled / student, 3)
        return {**clock, "cpu_time": processor} if self.device.type == "cpu" else clock

    def _operators(self, name: str) -> int:
        with Operators() as operators:
            self.steppers[name]([self.batch], WARM_UP + self.options.steps, StepTimer(self.device))
        return operators.count

    def _ratios(self, rounds: Sequence[dict[str, Times]], kind: int) -> dict[str, float]:
        def ratio(way: str, base: str) -> float:
            return round(median(found[way][kind] / found[base][kind] for found in rounds), 3)

        figures = {
            "cached_over_student": ratio("cached", "student"),
            "cached_over_in_memory": ratio("cached", "in memory"),
            "in_memory_over_student": ratio("in memory", "student"),
        }
        return {**figures, "online_over_cached": ratio("online", "cached")} if self.options.online else figures

    def _read(self) -> Iterator[Batch]:
        while True:
            self.epoch += 1
            yield from prefetch_to_device(self.reader.batches(self.epoch), self.device)

    def _block(self, name: str, batches: Iterator[Batch]) -> Times:
        """Of a step."""
        stepper, clock, started = self.steppers[name], StepTimer(self.device), np.zeros(2)
        stepper.wrapped.train()
        for step in range(WARM_UP + self.options.steps):
            if step == WARM_UP:
                started = self._now()
            stepper([next(batches)], step, clock)
        times: Times = (self._now() - started) / self.options.steps
        del batches
        gc.collect()  # the reader's threads end with its generator
        return times

    def _rendered(self, teacher: Teacher) -> Tensor:
        """Some images at a teacher's own size."""
        size, interpolation = teacher.spec.input_size, teacher.spec.interpolation
        images = (decode_image(data) for data in islice(cycle(self.jpegs), self.options.online_images))
        pixels = np.stack([crop_and_resize(image, FULL, size, interpolation) for image in images])
        return torch.from_numpy(pixels)

    def _encode(self, work: Sequence[tuple[Teacher, Tensor]]) -> Times:
        """Of all teachers for a batch."""
        started = self._now()
        for teacher, pixels in work:
            teacher.encode(pixels)
        times: Times = (self._now() - started) / self.options.online_images * self.options.batch_size
        return times

    def _now(self) -> Times:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])


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
        teacher.id: {kind: MeanStd(np.zeros(shape[-1]), np.ones(shape[-1])) for kind, shape in teacher.shapes.items()}
        for teacher in teachers
    }
    codecs = {teacher.id: teacher.codecs() for teacher in teachers}
    student = make_student(options.student)
    loss = LossConfig(max_patches=options.max_patches)
    return Distiller(student, teachers, standardisers, codecs, options.image_size, options.head_dim, loss)


def write_features(dataset: Dataset, model: str, codec: str) -> CachedTeacher:
    """Features for every row of a dataset, drawn from a normal distribution, in the shapes of a teacher."""
    config = TeacherConfig(model=model, weights="random")
    spec = make_teacher(config).spec
    teacher = CachedTeacher(config, spec, spec.name.replace("/", "-"), codec, "float32")
    generator = torch.Generator().manual_seed(0)
    compression = "zstd" if Codec.parse(codec).zstd else "none"
    drawn = {
        kind: codec.encode(torch.randn(16, *codec.shape, generator=generator))
        for kind, codec in teacher.codecs().items()
    }
    for record in dataset.images.records().values():
        rows = {kind: np.resize(encoded, (record.rows, encoded.shape[1])) for kind, encoded in drawn.items()}
        commit_features(dataset, teacher.id, record, rows, compression)
    return teacher


def load_teacher(model: str, device: torch.device) -> Teacher:
    """A teacher with random weights."""
    teacher = make_teacher(TeacherConfig(model=model, weights="random"))
    teacher.load(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return teacher


class EpochTask(DistillStep):
    """Epochs on one batch in memory; records the start of every step."""

    def __init__(self, options: argparse.Namespace, batch: Batch, module: nn.Module, file: str) -> None:
        super().__init__(module)
        self.options, self.batch, self.file = options, batch, file
        self.began: list[tuple[float, float]] = []

    def steps(self, epoch: int) -> int:
        """Of an epoch."""
        return int(self.options.ray_steps)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The same batch again and again."""
        return iter([self.batch] * (self.steps(epoch) - start))

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The distillation loss."""
        self.began.append((time.perf_counter(), time.process_time()))
        return super().loss(module, batch, device)

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Write the recorded times."""
        Path(self.file).write_text(json.dumps(self.began), encoding="utf-8")
        return {}


def make_epoch_task(payload: dict[str, Any], rank: int, world: int) -> EpochTask:
    """Build the task, in a worker of Ray Train or in this process."""
    options = payload["options"]
    bench = Bench.__new__(Bench)
    bench.options, bench.dataset, bench.teachers = options, payload["dataset"], payload["teachers"]
    batch = next(bench._reader().batches(0))
    return EpochTask(options, batch, make_distiller(options, payload["teachers"]), payload["file"])


def ray_over_bare(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Median time between the beginnings of two steps, under Ray Train over that in this process."""
    from pipeline.runtime.ray_session import connect

    images = jpegs(options.image_size)
    dataset = write_dataset(f"{folder}/ray-cache", max(64, options.batch_size), images, 64)
    teachers = [write_features(dataset, model, options.codec) for model in TEACHERS]
    payload: dict[str, Any] = {
        "options": options,
        "dataset": dataset,
        "teachers": teachers,
        "file": f"{folder}/times.json",
    }
    config = train_config(options, epochs=1, workers=1)
    device = torch.device(options.device)

    def bare(_: int) -> None:
        train(make_epoch_task(payload, 0, 1), config, Worker(device=device), None, lambda _: None)

    def ray(number: int) -> None:
        fit(make_epoch_task, payload, config, f"{folder}/ray-{number}", lambda *_: None)

    def times(run: Callable[[int], None], number: int) -> Times:
        run(number)
        began = np.array(json.loads(Path(payload["file"]).read_text(encoding="utf-8")))
        found: Times = np.median(np.diff(began[WARM_UP:], axis=0), axis=0)
        return found

    with connect():
        pairs = np.array([[times(run, number) for run in (bare, ray)] for number in range(options.ray_rounds)])
    print(
        f"ms a step, bare and under Ray Train, by the clock and of the processor:\n{(1000 * pairs).round(1).tolist()}"
    )
    clock, processor = np.median(pairs[:, 1] / pairs[:, 0], axis=0).round(3).tolist()
    return {"ray_over_bare": clock, "ray_over_bare_cpu_time": processor}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="regla_m")
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
