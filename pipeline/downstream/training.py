"""Fine-tuning as a task of the training engine. Imports neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from pipeline.downstream.backbone import encoder_name, load_start
from pipeline.downstream.base import DownstreamTask, Examples, make_task
from pipeline.downstream.config import FinetuneConfig, FinetuneJobConfig
from pipeline.downstream.pictures import write_report
from pipeline.downstream.sampling import Sampler, prepare, seeded
from pipeline.errors import UserError
from pipeline.training.config import TrainConfig
from pipeline.training.step import warmup
from pipeline.training.task import Task, TrainingBatch

POLY_POWER = 0.9
"""Of DeepLab (Chen et al. 2018, section 3.1), and of Semantic FPN in mmsegmentation."""


@dataclass(frozen=True)
class FinetuneJob:
    """What every training worker receives.

    Attributes:
        start: exported student that training starts from.
        folder: of the run, shared by all workers; evaluations are written below it.
    """

    config: FinetuneJobConfig
    start: Path
    folder: Path

    @property
    def task(self) -> DownstreamTask[Any]:
        """The downstream task under this configuration."""
        return make_task(self.config)


def build_model(job: FinetuneJob, classes: Sequence[str]) -> nn.Module:
    """The model with its starting weights; those of the head are seeded."""
    with seeded(job.config.seed):
        return job.task.build(load_start(job.start, job.config.finetune.frozen), classes)


class FinetuneTask(Task):
    """Fine-tunes on one rank.

    Args:
        soften: changes the targets of a batch on the training device, or None.
    """

    def __init__(
        self, job: FinetuneJob, rank: int = 0, world: int = 1, soften: Callable[[Any, torch.device], Any] | None = None
    ) -> None:
        self.soften = soften
        self.job, self.task, config = job, job.task, job.config
        self.headline = self.task.headline if config.train.best_is == "highest" else None
        self.seed = config.seed
        train = self.task.open("train")
        assert train is not None
        self.train: Examples = train
        self.val = self.task.open("val", train.classes)
        self.module = build_model(job, train.classes)
        if config.finetune.backbone_lr != 1:
            self.lr_factors = {encoder_name(self.module): config.finetune.backbone_lr}
        self.sampler = Sampler(
            len(train),
            config.train.batch_size // world * world,
            config.seed,
            whole_passes=not config.finetune.epoch_steps,
            block=train.block,
            window=config.train.shuffle_window,
            rank=rank,
            world=world,
        )

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        return epoch_steps(self.job.config, len(self.train))

    def batches(self, epoch: int, start: int) -> Iterator[TrainingBatch]:
        """This rank's batches of an epoch."""
        steps = self.steps(epoch)
        numbers = range(epoch * steps + start, (epoch + 1) * steps)
        make = partial(_make_batch, self.task, self.train, self.sampler)
        return prepare(make, numbers, self.job.config.finetune.data_workers)

    def with_share(self, share: int) -> FinetuneTask:
        """This task with the batches of another share."""
        other = copy(self)
        other.sampler = replace(self.sampler, rank=share)
        return other

    def schedule(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Scheduler | None:
        """The schedule that `finetune.schedule` names."""
        return make_schedule(optimizer, config, self.job.config.finetune, [self.steps(0)] * config.epochs)

    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the downstream task."""
        return self.task.loss(module, self.soften(batch, device) if self.soften else batch, device)

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Metrics of the averaged weights on held-out images, if any; tables and pictures go to `<run>/evaluation`."""
        if self.val is None:
            return {}
        report = self.task.evaluate(averaged, self.val, self.worker)
        if self.worker.rank == 0:
            write_report(report, self.job.folder / "evaluation", self.val.classes)
        return report.metrics


def _make_batch(task: DownstreamTask[Any], train: Examples, sampler: Sampler, number: int) -> TrainingBatch:
    return task.batch(train, sampler.batch(number))


def epoch_steps(config: FinetuneJobConfig, images: int) -> int:
    """Optimiser steps of an epoch.

    Raises:
        UserError: if the images do not fill one batch.
    """
    batch = config.train.for_images(images).batch_size
    if not config.finetune.epoch_steps and images < batch:
        raise UserError(f"train.batch_size={batch} is more than the {images} training images; lower it")
    return config.finetune.epoch_steps or images // batch


def make_schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig, finetune: FinetuneConfig, steps: Sequence[int]
) -> Scheduler | None:
    """Linear warm-up, then poly or multistep, from the steps of each epoch; None for the engine's own cosine."""
    if finetune.schedule == "cosine":
        return None
    start = warmup(train, steps)
    if finetune.schedule == "poly":
        return PolyLRScheduler(optimizer, t_initial=sum(steps), power=POLY_POWER, lr_min=train.min_lr, **start)
    # timm applies milestone m at step m - 1.
    milestones = [sum(steps[:epoch]) + 1 for epoch in sorted(finetune.milestones)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, **start)
