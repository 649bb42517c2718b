"""The interface of a training task: model, data, loss and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.training.config import TrainConfig
from pipeline.training.worker import ALONE, Worker

History = list[tuple[int, dict[str, float]]]
"""(step, metrics) in order."""


class TrainingBatch(Protocol):
    """The part of a batch that the engine uses."""

    @property
    def keys(self) -> list[str]:
        """Sample ids."""


class Task(ABC):
    """A training task, made for one share of the global batch.

    Attributes:
        module: its forward gives the loss of a batch; on the CPU until the engine moves it.
        seed: of random numbers in a forward, such as dropout: torch's generators are seeded with (seed, step, share) before
            each forward, so that a resumed run draws the same numbers.
        uses_all_parameters: whether every loss depends on all trained parameters, so that DDP need not search each step for
            unused ones.
        compiles_by_default: whether a forward is the same operations on the same shapes in every step, so that torch.compile
            gains on a GPU unless `train.compile` is false.
        lr_factors: factors of the learning rate by the name of a submodule of `module`; 1 for all others.
        headline: the metric whose highest value is the best if `train.best_metric` names none; None: no checkpoint is the best.
        worker: set by the engine; there may be fewer workers than shares.
    """

    module: nn.Module
    seed: int = 0
    uses_all_parameters: ClassVar[bool] = False
    compiles_by_default: ClassVar[bool] = False
    lr_factors: Mapping[str, float] = MappingProxyType({})
    headline: str | None = None
    worker: Worker = ALONE

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """Number of steps in an epoch, the same for every share."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[TrainingBatch]:
        """This share's batches of an epoch from batch number `start` on; the two arguments determine them."""

    def with_share(self, share: int) -> Task:
        """This task with the batches of another share and the same module, for a worker that computes several shares."""
        raise NotImplementedError

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of a batch on the device, and its detached parts by name, all means over the images; runs under autocast."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """The parts of a batch whose images have one size each; every part is a forward of its own, or several."""
        return [batch]

    def before_step(self, batches: Sequence[Any]) -> None:  # noqa: B027  optional
        """Hook before a step, on every rank; `batches` are those of the own shares, on the device, whole."""

    def after_step(self, batches: Sequence[Any]) -> None:  # noqa: B027  optional
        """Hook after a step, on every rank; `batches` are those of the own shares, on the device."""

    @abstractmethod
    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Metrics on held-out data. All ranks may compute them together (`worker`); only rank 0's result is used.

        Args:
            averaged, raw: the module with EMA weights and with current weights, in evaluation mode on the training device,
                equal on every rank; `raw` is None before the first step.
        """

    def schedule(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Scheduler | None:
        """A learning-rate schedule by step; None: linear warm-up, then a cosine."""
        return None

    def draw(self, module: nn.Module, evaluations: History) -> None:  # noqa: B027  optional
        """Hook on rank 0 after every evaluation, for figures of the module with EMA weights."""


def check_best_metric(name: str | None, evaluated: Collection[str]) -> None:
    """Raise a UserError with the known metrics if `train.best_metric` is not evaluated."""
    if name is None or name in evaluated:
        return
    if not evaluated:
        raise UserError(f"train.best_metric={name} needs held-out images to evaluate on: set data.val")
    raise UserError(f"train.best_metric={name} is not an evaluated metric: {', '.join(evaluated)}")


def split_batch(batch: Any, pieces: int) -> list[Any]:
    """A batch in `pieces` of nearly equal size, at most one per image.

    Args:
        batch: a dataclass or NamedTuple of tensors and lists, and mappings of them, with the images as first dimension.
    """
    images = len(batch.keys)
    pieces = min(pieces, images)
    if pieces == 1:
        return [batch]

    def cut(start: int, end: int) -> Any:
        return map_parts(batch, lambda value: value[start:end] if isinstance(value, Tensor | list) else value)

    bounds = [images * number // pieces for number in range(pieces + 1)]
    return [cut(start, end) for start, end in pairwise(bounds)]


def map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested dataclasses, NamedTuples and mappings with `function` applied to their leaves."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: map_parts(getattr(value, part.name), function) for part in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_parts(item, function) for item in value))
    if isinstance(value, Mapping):
        return {name: map_parts(item, function) for name, item in value.items()}
    return function(value)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy of nested dataclasses, NamedTuples, mappings and lists with `function` applied to their tensors."""

    def apply(part: Any) -> Any:
        if isinstance(part, list):
            return [map_tensors(item, function) for item in part]
        return function(part) if isinstance(part, Tensor) else part

    return map_parts(value, apply)


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of a batch with all tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def list_tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch that :func:`to_device` moves."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found
