"""Distillation as a task of the training engine. Imports neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.distill.augment import augment
from pipeline.distill.balance import is_scheduled, teacher_weights
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import Distiller
from pipeline.distill.figures import FigureWriter
from pipeline.distill.held_out import HeldOut, compare_with_teachers
from pipeline.distill.phases import PhaseState, transfer_weights
from pipeline.distill.standardise import make_standardisers
from pipeline.evaluate.knn import student_knn
from pipeline.imaging.decoder_pool import decoder_count
from pipeline.student.model import Encoder, Student, create_backbone, freeze_unused
from pipeline.training.task import History, Task


@dataclass(frozen=True)
class DistillJob:
    """What every training worker receives.

    Attributes:
        config: the whole tree.
        train: dataset to distil on.
        val: labelled held-out images for kNN, or None.
        teachers: with complete shards in `train` and `held_out`.
        held_out: held-out images, labelled or not, on which student and teachers are compared; or None.
    """

    config: DistillJobConfig
    train: Dataset
    val: Dataset | None
    teachers: tuple[CachedTeacher, ...]
    held_out: Dataset | None = None


def build_student(config: DistillJobConfig) -> Student:
    """The student of a configuration with its seeded initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = create_backbone(config.student.name, config.student.args)
        return Student(Encoder(backbone), config.student.token_dim, config.student.taps)


def build_distiller(job: DistillJob) -> Distiller:
    """Student, heads and frozen statistics, with seeded initial weights."""
    config = job.config
    student = build_student(config)
    freeze_unused(student, config.student.input_size)
    method = config.loss.standardise
    standardisers = {teacher.id: make_standardisers(job.train, teacher, method) for teacher in job.teachers}
    codecs = {teacher.id: load_codecs(job.train, teacher) for teacher in job.teachers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Distiller(
            student,
            job.teachers,
            standardisers,
            codecs,
            config.student.input_size,
            config.student.head_dim,
            config.loss,
        )


def build_reader(job: DistillJob, rank: int = 0, world: int = 1) -> CacheReader | ReaderProcess:
    """Training images and features in the order of one rank; with a GPU, a process of its own reads them."""
    config = job.config
    make = ReaderProcess if torch.cuda.is_available() else CacheReader
    return make(
        job.train,
        job.teachers,
        image_size=config.student.input_size,
        batch_size=config.train.batch_size // world,
        seed=config.seed,
        window=config.train.shuffle_window,
        rank=rank,
        world=world,
        threads=decoder_count(),
        per_step=config.views.per_step,
    )


class DistillTask(Task):
    """Distils on one rank.

    Args:
        before: file with the state of the phase before, or None.
        figures: draws after evaluations, or None.
    """

    module: Distiller
    uses_all_parameters = True

    def __init__(
        self,
        job: DistillJob,
        rank: int = 0,
        world: int = 1,
        before: str | None = None,
        figures: FigureWriter | None = None,
    ) -> None:
        self.job, self.figures, self.world = job, figures, world
        config = job.config
        self.seed = config.seed
        self.module = build_distiller(job)
        if before:
            transfer_weights(self.module, PhaseState.load(Path(before)))
        self.reader = build_reader(job, rank, world)
        self._steps: dict[int, int] = {}

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        if epoch not in self._steps:
            self._steps[epoch] = self.reader.steps(epoch)
        return self._steps[epoch]

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """This rank's batches of an epoch."""
        return self.reader.batches(epoch, start)

    def with_share(self, share: int) -> DistillTask:
        """This task with the batches of another share."""
        other = copy(self)
        other.reader = build_reader(self.job, share, self.world)
        return other

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The distillation loss of a batch.

        In training, augmentation and teacher dropping use torch's CPU generator, which the engine seeds.

        Args:
            module: the wrapped distiller, on `device`.
            batch: on `device`.
        """
        images, weights, draws, step = batch.images, None, None, None
        if module.training:
            images = augment(images, self.job.config.augment)
            draws = self._draws(len(batch.keys), device)
            weights, step = self._weights(batch.position, device), self._step(batch.position, device)
        result: tuple[Tensor, dict[str, Tensor]] = module(images, batch.features, weights, draws, step)
        return result

    def after_step(self, batches: Sequence[Batch]) -> None:
        """Append the summaries of the global batch to the queues, identically on all ranks."""
        for target in self.module.targets_with_queue():
            own = [batch.features[target.teacher.id]["summary"] for batch in batches]
            target.push_summaries(self.worker.all_gather(own))

    def _draws(self, count: int, device: torch.device) -> Tensor | None:
        if not self.job.config.loss.drop:
            return None
        return torch.rand(count, len(self.job.teachers)).to(device, non_blocking=True)

    def _step(self, position: tuple[int, int], device: torch.device) -> Tensor:
        epoch, number = position
        return torch.tensor(epoch * self.steps(epoch) + number).to(device, non_blocking=True)

    def _weights(self, position: tuple[int, int], device: torch.device) -> Tensor | None:
        if not is_scheduled(self.job.teachers):
            return None
        epoch, number = position
        progress = (epoch + number / self.steps(epoch)) / self.job.config.train.epochs
        return teacher_weights(self.job.teachers, progress).to(device, non_blocking=True)

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """kNN accuracy in percent of averaged and raw weights on labelled held-out images, from one pass over them, and the
        averaged weights compared with the teachers on all held-out images.
        """
        assert isinstance(averaged, Distiller)
        metrics = self._knn([averaged.student.encoder, *([raw.student.encoder] if isinstance(raw, Distiller) else [])])
        if not self.worker.rank and self.held_out:
            metrics |= compare_with_teachers(averaged, self.held_out.batches(), self.held_out.codecs)
        return metrics

    def _knn(self, encoders: Sequence[nn.Module]) -> dict[str, float]:
        job, config = self.job, self.job.config
        if job.val is None:
            return {}
        scores = student_knn(encoders, job.train, job.val, config.student.input_size, config.knn, self.worker)
        return {"knn": scores[0], "knn_raw": scores[-1]}

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The held-out images with features; opened on first use, on rank 0 only."""
        job, config = self.job, self.job.config
        if job.held_out is None:
            return None
        return HeldOut(job.held_out, job.teachers, config.student.input_size, config.knn.batch_size)

    @cached_property
    def shown(self) -> Batch:
        """Images whose features are drawn: held-out images if available."""
        return next(self.held_out.batches() if self.held_out else self.reader.batches(0))

    def draw(self, module: nn.Module, evaluations: History) -> None:
        """Draw curves, and features as colours."""
        if self.figures is not None:
            assert isinstance(module, Distiller)
            self.figures.draw(module, evaluations, self.shown, self.held_out.codecs if self.held_out else None)


def make_distill_task(payload: dict[str, Any], rank: int, world: int) -> DistillTask:
    """The task of one Ray Train worker.

    Args:
        payload: ``job``, and optionally ``before`` and ``figures``, as in `DistillTask`.
    """
    return DistillTask(payload["job"], rank, world, payload.get("before"), payload.get("figures"))
