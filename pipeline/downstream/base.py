"""What the three downstream tasks share: data, a model on a backbone, a loss, and a report on held-out images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.sampling import Draw
from pipeline.student.model import Encoder
from pipeline.training.task import TrainingBatch
from pipeline.training.worker import Worker

Split = Literal["train", "val"]


class Examples(Protocol):
    """Images with their annotations, in rows. Light to open: workers open them again by the configuration."""

    location: str
    classes: tuple[str, ...]
    block: int
    """Neighbouring rows that are quick to read together; 1: any order is as quick."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Sample id of a row, by which users find its file."""

    def check(self) -> list[str]:
        """Look at every file, and give notes on what is passed over.

        Raises:
            UserError: naming the first file that is wrong, and how.
        """


@dataclass(frozen=True)
class Report:
    """How a model does on held-out images.

    Attributes:
        metrics: by name.
        per_class: a row of a table for each class.
        confusion: int64 [K, K], true class by predicted class, or None where there is no such thing.
        pictures: by sample id: uint8 [3, H, W], the image with annotations beside predictions.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, str | float]] = field(default_factory=list)
    confusion: Tensor | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)


class Downstream(ABC):
    """A downstream task. Stateless."""

    name: ClassVar[str]
    headline: ClassVar[str]
    """The metric that is told first."""
    least_classes: ClassVar[int] = 2
    """With fewer there is nothing to learn."""

    @abstractmethod
    def open(self, config: FinetuneJobConfig, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """The images of a split; None where `data.val` is not given.

        Args:
            classes: that labels count where the images bring no names of their own.

        Raises:
            UserError: where there is nothing, or not in the expected layout.
        """

    @abstractmethod
    def build(self, encoder: Encoder, classes: Sequence[str], config: FinetuneJobConfig) -> nn.Module:
        """The model on a backbone, its head freshly initialised.

        Raises:
            UserError: where the backbone does not give what the head needs.
        """

    def image_size(self, config: FinetuneJobConfig) -> tuple[int, int]:
        """Height and width in pixels of an image as the backbone may see it: the square of `student.input_size`."""
        return config.student.input_size, config.student.input_size

    @abstractmethod
    def settings(self, config: FinetuneJobConfig) -> Mapping[str, Mapping[str, Any]]:
        """Fields by section that a saved model is built and evaluated with: kept beside its weights."""

    @abstractmethod
    def batch(self, examples: Any, config: FinetuneJobConfig, draws: Sequence[Draw]) -> TrainingBatch:
        """An augmented training batch; a function of the seed and the draws.

        Raises:
            UserError: naming an image that cannot be read.
        """

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`pipeline.training.task.Task.loss`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Any, config: FinetuneJobConfig, worker: Worker) -> Report:
        """Evaluate on all ranks together; tables and pictures are filled on rank 0 alone.

        Args:
            model: in evaluation mode, on its device, with equal weights on every rank.
            worker: this rank, which takes its `rows` of the examples.
        """


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` rows, evenly spaced."""
    return sorted({i * count // wanted for i in range(min(wanted, count))}) if wanted else []
