"""What is trained, on what, and how it is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
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
    """What the engine needs to know of a batch."""

    @property
    def keys(self) -> list[str]:
        """Sample ids."""


class Task(ABC):
    """What is trained, on what, and how it is judged; made for one share of the global batch.

    Attributes:
        module: whose forward gives the loss of a batch; on the CPU until the engine moves it.
        seed: of what a forward draws (dropout and the like): torch's generators are seeded with (seed, step, share)
            before it, so that a resumed run draws what it would have drawn.
        uses_all_parameters: whether every loss depends on all trained parameters: DDP then waits for all gradients
            without checking in every step for those that will not come.
        worker: this process among the workers, set by the engine; there may be fewer of them than shares.
    """

    module: nn.Module
    seed: int = 0
    uses_all_parameters: ClassVar[bool] = False
    worker: Worker = ALONE

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """Steps of an epoch, equal for every share."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[TrainingBatch]:
        """This share's batches of an epoch from number `start` on: a function of both, of equal length for every share."""

    def with_share(self, share: int) -> Task:
        """This task with the batches of another share and the same module, for a worker that computes several shares."""
        raise NotImplementedError

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of a batch on the device, and its parts by name, detached; called under autocast.

        Both are means over the images of the batch: that is how the engine weighs pieces of a larger one.
        """

    def after_step(self, batches: Sequence[Any]) -> None:  # noqa: B027  optional
        """What is kept of a step for those that follow, on every rank once it is done; by default nothing.

        Args:
            batches: of the own shares, on the device.
        """

    @abstractmethod
    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """Metrics on held-out data, which all ranks may compute together (`worker`); those that rank 0 gives count.

        Args:
            averaged, raw: the module with the EMA weights and with those of the last step, in evaluation mode, on the training
                device, with equal weights on every rank; before the first step there is nothing to average, and no `raw`.
        """

    def schedule(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Scheduler | None:
        """A learning rate by step of the task's own; None: linear warm-up, then a cosine."""
        return None

    def split(self, batch: Any, pieces: int) -> list[Any]:
        """A batch in pieces whose gradients are accumulated; see :func:`split_batch`."""
        return split_batch(batch, pieces)

    def draw(self, module: nn.Module, evaluations: History) -> None:  # noqa: B027  optional
        """Draw what there is to see, on rank 0 after every evaluation, with the EMA weights; by default nothing."""


def check_best_metric(name: str | None, evaluated: Collection[str]) -> None:
    """Refuse a metric that is not evaluated.

    Args:
        name: of `train.best_metric`.
        evaluated: names of metrics.

    Raises:
        UserError: naming the field and what there is.
    """
    if name is not None and name not in evaluated:
        known = ", ".join(evaluated) or "nothing: there are no held-out images"
        raise UserError(f"train.best_metric={name} is not among what is evaluated: {known}")


def split_batch(batch: Any, pieces: int) -> list[Any]:
    """A batch in `pieces`, or one an image where that is fewer, whose sizes differ by one image at most.

    Args:
        batch: a dataclass or NamedTuple whose tensors and lists, and mappings of them, all have one entry an image first.
    """
    images = len(batch.keys)
    pieces = min(pieces, images)
    bounds = [images * number // pieces for number in range(pieces + 1)]
    return [batch] if pieces == 1 else [_cut(batch, slice(*ends)) for ends in pairwise(bounds)]


def _cut(batch: Any, part: slice) -> Any:
    return map_parts(batch, lambda value: value[part] if isinstance(value, Tensor | list) else value)


def map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """The like of a dataclass, NamedTuple or mapping, however they are nested, with `function` of each of their parts."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: map_parts(getattr(value, part.name), function) for part in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_parts(item, function) for item in value))
    if isinstance(value, Mapping):
        return {name: map_parts(item, function) for name, item in value.items()}
    return function(value)
