"""The interface of downstream tasks: data, model, loss, evaluation, predictions, export and comparison.

A subclass of :class:`DownstreamTask` is a complete plug-in: the jobs, `pipeline.predict`, `pipeline.export` and
`pipeline.compare` know nothing else about a task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.tree import Section
from pipeline.downstream.config import TASKS, FinetuneConfig, FinetuneJobConfig, import_task
from pipeline.downstream.sampling import Draw
from pipeline.sources.hold_out import Split
from pipeline.student.model import Encoder
from pipeline.training.task import TrainingBatch
from pipeline.training.worker import Worker

if TYPE_CHECKING:
    from pipeline.downstream.saved import SavedModel

Settings = TypeVar("Settings", bound=Section)


class Examples(Protocol):
    """Images with their annotations, by row; cheap to open, as every worker opens them again."""

    location: str
    classes: tuple[str, ...]
    """Names by number; empty for a task without classes."""
    block: int
    """Number of neighbouring rows that are fast to read together; 1: any order is as fast."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Sample id of a row, which leads users to its file."""

    def check(self) -> list[str]:
        """Check every file; returns notes on what is skipped.

        Raises:
            UserError: naming the first bad file and its fault.
        """


@dataclass(frozen=True)
class Report:
    """Results on held-out images.

    Attributes:
        per_class: rows of a table, one per class.
        confusion: int64 [K, K], true class by predicted class; None for a task without classes.
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
        metric: name in :attr:`Report.metrics`.
        key: unique name in CSV files.
        label, unit: for people.
        factor: from the metric to `unit`.
        higher_is_better: such a column is an accuracy, with Pareto fronts and significance tests.
        digits: after the decimal point.
        missing: value that means no measurement.
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
        output, meaning: name and description of the output.
        crop_share: side of the centre crop as a share of the resized image's side; None: the whole image as a square.
        classifier: BatchNorm and linear layer, if the head is nothing else after the average pool. Only such a head has the
            `hf` format, where timm's own classifier holds them.
    """

    output: str
    meaning: str
    crop_share: float | None = None
    classifier: tuple[nn.BatchNorm1d, nn.Linear] | None = None


class DownstreamTask(ABC, Generic[Settings]):
    """A downstream task under the configuration of a job; `settings` is its own section of that."""

    name: ClassVar[str]
    """Name of its configuration section and of its models in MLflow's registry."""
    headline: ClassVar[str]
    """The metric that ranks models; higher is better."""
    section: ClassVar[type[Section]] = Section
    """Class of its configuration section; every field has a default."""
    locations: ClassVar[tuple[str, ...]] = ()
    """Fields of the section that hold paths; workers receive them as absolute paths."""
    columns: ClassVar[tuple[Column, ...]] = ()
    min_classes: ClassVar[int] = 0
    """Smallest number of classes that it can learn."""
    batched: ClassVar[bool] = False
    """Whether :meth:`predict` takes several images at once."""
    any_input_size: ClassVar[bool] = False
    """Whether a prediction may change `student.input_size`."""
    folders: ClassVar[tuple[str, ...]] = ("pictures",)
    """Folders that predictions are written to, next to `predictions.json`."""

    def __init__(self, config: FinetuneJobConfig) -> None:
        self.config = config
        self.settings: Settings = getattr(config, self.name)

    @abstractmethod
    def open(self, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """The images of a split; None if there is no `data.val`.

        Args:
            classes: names by label, for data without names.

        Raises:
            UserError: if data is missing or has another layout.
        """

    @abstractmethod
    def build(self, encoder: Encoder, classes: Sequence[str]) -> nn.Module:
        """The model: a backbone and a freshly initialised head.

        Raises:
            UserError: if the head does not fit the backbone.
        """

    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of an image that the backbone must accept."""
        return self.config.student.input_size, self.config.student.input_size

    def saved_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """JSON-ready fields by section that a saved model is built, evaluated and run with; stored with its weights."""
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
        """The fine-tuned model that gives soft targets; None: only labels.

        Raises:
            UserError: if there is no such model, or it does not fit.
        """
        return None

    def make_softener(self, teacher: nn.Module) -> Callable[[Any, torch.device], Any]:
        """A function that mixes the predictions of :meth:`find_teacher`'s model into a batch's targets, on a device."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Any, worker: Worker) -> Report:
        """Evaluate on all ranks together; only rank 0 fills tables and pictures.

        Args:
            model: in evaluation mode, on its device, with equal weights on every rank.
            worker: this rank, which evaluates its `own_rows`.
        """

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The headline of :attr:`Report.metrics`; None if it was not measured."""
        missing = {column.metric: column.missing for column in self.columns}
        value = metrics.get(self.headline)
        return None if value == missing.get(self.headline) else value

    def in_words(self, metric: str, value: float) -> str:
        """The value of a metric in :attr:`Report.metrics`, for people."""
        return f"{value:.3f}"

    def charts(self, metrics: Mapping[str, float]) -> dict[str, list[str]]:
        """What a report draws of :attr:`Report.metrics`: by the title of a chart, the names of metrics of one unit."""
        return {name: [name] for name in metrics}

    @abstractmethod
    def predict(self, model: nn.Module, images: Sequence[Tensor], classes: Sequence[str]) -> list[Any]:
        """A result for each image, on the CPU; called in inference mode.

        Args:
            model: in evaluation mode, on its device.
            images: uint8 [3, H, W] of any size; only one unless the task is `batched`.
        """

    @abstractmethod
    def draw(self, image: Tensor, result: Any, classes: Sequence[str]) -> Tensor:
        """A result drawn over its image: uint8 [3, H, W] -> [3, H', W']."""

    @abstractmethod
    def describe(self, image: Tensor, result: Any, classes: Sequence[str], folder: Path, stem: str) -> dict[str, Any]:
        """A result, JSON-ready; what is too large goes to files named `stem` below the :attr:`folders` of `folder`."""

    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
        """JSON documents by file name, from the results of :meth:`describe` with the ``path`` of each image."""
        return {"predictions.json": rows}

    def export_form(self, model: nn.Module) -> ExportForm | None:
        """How the model is exported; None: it cannot be."""
        return None


def load_task(task: str) -> type[DownstreamTask[Any]]:
    """The class of a task, by its short name or as `package.module:Class`.

    Raises:
        UserError: if there is no such task.
    """
    found: type[DownstreamTask[Any]] = import_task(task)
    return found


def make_task(config: FinetuneJobConfig) -> DownstreamTask[Any]:
    """The task that `finetune.task` names, under this configuration."""
    return load_task(config.finetune.task)(config)


def built_in_tasks() -> list[DownstreamTask[Any]]:
    """Every task with a short name, under its default configuration."""
    return [make_task(FinetuneJobConfig.of_task(name)(finetune=FinetuneConfig(task=name))) for name in TASKS]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` evenly spaced rows of `count`."""
    return sorted({i * count // wanted for i in range(min(wanted, count))}) if wanted else []
