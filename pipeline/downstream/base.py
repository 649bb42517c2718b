"""What a downstream task is: data, a model on a backbone, a loss, a report, predictions, an export and columns of a comparison.

A subclass of :class:`DownstreamTask` is a whole plug-in: the jobs and `pipeline.predict`, `pipeline.export` and
`pipeline.compare` know nothing else of a task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.tree import Section
from pipeline.downstream.config import FinetuneJobConfig, import_task
from pipeline.downstream.sampling import Draw
from pipeline.student.model import Encoder
from pipeline.training.task import TrainingBatch
from pipeline.training.worker import Worker

if TYPE_CHECKING:
    from pipeline.downstream.saved import SavedModel

Split = Literal["train", "val"]
Settings = TypeVar("Settings", bound=Section)


class Examples(Protocol):
    """Images with their annotations, in rows. Cheap to open: every worker opens them again."""

    location: str
    classes: tuple[str, ...]
    """Names by number; empty for a task without classes."""
    block: int
    """Neighbouring rows that are quick to read together; 1: any order is as quick."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Sample id of a row, by which users find its file."""

    def check(self) -> list[str]:
        """Check every file; returns notes on what is skipped.

        Raises:
            UserError: naming the first file that is wrong, and how.
        """


@dataclass(frozen=True)
class Report:
    """How a model does on held-out images.

    Attributes:
        metrics: by name.
        per_class: rows of a table, one for each class.
        confusion: int64 [K, K], true class by predicted class; None for a task without one.
        pictures: uint8 [3, H, W] by sample id: the image with annotations and predictions.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, str | float]] = field(default_factory=list)
    confusion: Tensor | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A metric as a column of `jobs/compare.py`.

    Attributes:
        metric: its name in :attr:`Report.metrics`.
        key: its name in CSV files, unlike that of any other measure.
        label, unit: for people.
        factor: from the metric to `unit`.
        higher_is_better: such columns are accuracies: they get Pareto fronts and tests of significance.
        digits: after the point.
        missing: the value that stands for no measurement.
    """

    metric: str
    key: str
    label: str
    unit: str = "%"
    factor: float = 1.0
    higher_is_better: bool = True
    digits: int = 1
    missing: float | None = None


class SoftTeacher(NamedTuple):
    """A fine-tuned model whose probabilities are mixed into the targets, its address, and a summary for the plan."""

    saved: SavedModel
    source: str
    summary: str


@dataclass(frozen=True)
class ExportForm:
    """How a fine-tuned model is exported: a module from images to one tensor.

    Attributes:
        output, meaning: name of the output, and its description.
        crop_share: share of the resized image's side in the centre crop; None: the whole image, resized to a square.
        classifier: the BatchNorm and the linear layer that follow the average pool, if the head is nothing else; timm's own
            classifier holds them in the `hf` format, which others do not have.
    """

    output: str
    meaning: str
    crop_share: float | None = None
    classifier: tuple[nn.BatchNorm1d, nn.Linear] | None = None


class DownstreamTask(ABC, Generic[Settings]):
    """A downstream task under one configuration.

    Args:
        config: of the job.

    Attributes:
        settings: the task's own section of it.
    """

    name: ClassVar[str]
    """Of its section in the configuration, and of its models in MLflow's registry."""
    headline: ClassVar[str]
    """The metric that decides which model is the best; higher is better."""
    section: ClassVar[type[Section]] = Section
    """Class of its configuration section; every field has a default."""
    locations: ClassVar[tuple[str, ...]] = ()
    """Fields of the section that hold paths, which workers need absolute."""
    columns: ClassVar[tuple[Column, ...]] = ()
    min_classes: ClassVar[int] = 0
    """The smallest number of classes that can be learned."""
    batched: ClassVar[bool] = False
    """Whether :meth:`predict` takes several images at a time."""
    any_input_size: ClassVar[bool] = False
    """Whether a prediction may change `student.input_size`."""
    folders: ClassVar[tuple[str, ...]] = ("pictures",)
    """Folders that predictions are written to, next to `predictions.json`."""

    def __init__(self, config: FinetuneJobConfig) -> None:
        self.config = config
        self.settings: Settings = getattr(config, self.name)

    @abstractmethod
    def open(self, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """The images of a split; None if `data.val` is not given.

        Args:
            classes: names by label, for images that bring no names of their own.

        Raises:
            UserError: if there is nothing, or not in the expected layout.
        """

    @abstractmethod
    def build(self, encoder: Encoder, classes: Sequence[str]) -> nn.Module:
        """The model on a backbone, its head freshly initialised.

        Raises:
            UserError: if the backbone does not give what the head needs.
        """

    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of images as the backbone may see them."""
        return self.config.student.input_size, self.config.student.input_size

    def saved_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Fields by section, JSON-ready, that a saved model needs to be built, evaluated and run; stored with its weights."""
        return {
            "student": {"input_size": self.config.student.input_size},
            self.name: self.settings.model_dump(mode="json", exclude=set(self.locations)),
        }

    @abstractmethod
    def batch(self, examples: Any, draws: Sequence[Draw]) -> TrainingBatch:
        """An augmented training batch; a function of the seed and the draws.

        Raises:
            UserError: naming an image that cannot be read.
        """

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`pipeline.training.task.Task.loss`."""

    def find_teacher(self, classes: Sequence[str], tracking_uri: str) -> SoftTeacher | None:
        """The fine-tuned model that helps to train; None: labels alone.

        Raises:
            UserError: if there is no such model, or it does not fit.
        """
        return None

    def make_softener(self, teacher: nn.Module) -> Callable[[Any, torch.device], Any]:
        """What mixes the answers of :meth:`find_teacher`'s model into the targets of a batch, on the training device."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Any, worker: Worker) -> Report:
        """Evaluate on all ranks together; tables and pictures are filled on rank 0 alone.

        Args:
            model: in evaluation mode, on its device, with equal weights on every rank.
            worker: this rank, which takes its `own_rows` of the examples.
        """

    @abstractmethod
    def predict(self, model: nn.Module, images: Sequence[Tensor], classes: Sequence[str]) -> list[Any]:
        """A result for each image, on the CPU; called under inference mode.

        Args:
            model: in evaluation mode, on its device.
            images: uint8 [3, H, W] of any sizes; one, unless the task is `batched`.
        """

    @abstractmethod
    def draw(self, image: Tensor, result: Any, classes: Sequence[str]) -> Tensor:
        """A picture uint8 [3, H', W'] of a result over its image uint8 [3, H, W]."""

    @abstractmethod
    def describe(self, image: Tensor, result: Any, classes: Sequence[str], folder: Path, stem: str) -> dict[str, Any]:
        """A result, JSON-ready.

        Args:
            folder: holds :attr:`folders`, for results that are too large for JSON.
            stem: name of the files of this image, without extension.
        """

    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
        """JSON documents by file name, made of what :meth:`describe` gave for each image, with its ``path``."""
        return {"predictions.json": rows}

    def export_form(self, model: nn.Module) -> ExportForm | None:
        """How :meth:`build`'s model is exported; None: it is not."""
        return None


def load_task(task: str) -> type[DownstreamTask[Any]]:
    """The class of a task, by its short name or as `package.module:Class`.

    Raises:
        UserError: if there is no such task.
    """
    found: type[DownstreamTask[Any]] = import_task(task)
    return found


def make_task(config: FinetuneJobConfig) -> DownstreamTask[Any]:
    """The task that `finetune.task` names, under this configuration.

    Raises:
        UserError: if there is no such task.
    """
    return load_task(config.finetune.task)(config)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` rows, evenly spaced."""
    return sorted({i * count // wanted for i in range(min(wanted, count))}) if wanted else []
