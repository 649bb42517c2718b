"""Downstream tasks by name, and the configuration of the jobs that train and evaluate them."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

from pydantic import Field, PositiveInt, create_model

from pipeline.config.tree import Section, operational
from pipeline.downstream.classify.config import ClassifyConfig
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.errors import UserError, did_you_mean
from pipeline.runs.config import ImageJobConfig, JobConfig
from pipeline.student.config import NamedBackboneConfig
from pipeline.training.config import TrainConfig
from teachers.plugin import import_plugin


class BuiltInTask(NamedTuple):
    """The section and the location of a task's class: `--help` needs the section without importing the class and torch."""

    section: type[Section]
    location: str


TASKS: dict[str, BuiltInTask] = {
    "classify": BuiltInTask(ClassifyConfig, "pipeline.downstream.classify.task:Classification"),
    "segment": BuiltInTask(SegmentConfig, "pipeline.downstream.segment.task:Segmentation"),
    "detect": BuiltInTask(DetectConfig, "pipeline.downstream.detect.task:Detection"),
}
"""Tasks with a short name; a user's own plugs in as `package.module:Class`."""


def import_task(task: str) -> Any:
    """The class of a task, by its short name or as `package.module:Class`.

    Raises:
        UserError: if there is no such task.
    """
    if task not in TASKS and ":" not in task:
        hint = did_you_mean(task, TASKS, "did you mean {}? ")
        raise UserError(
            f"finetune.task: there is no task {task}; {hint}known are {', '.join(TASKS)}, and package.module:Class"
        )
    try:
        found = import_plugin(TASKS[task].location if task in TASKS else task)
    except ImportError as error:
        raise UserError(f"finetune.task: {error}") from error
    if not all(hasattr(found, attribute) for attribute in ("name", "headline", "section", "locations")):
        raise UserError(f"finetune.task: {task} is not a subclass of pipeline.downstream.base.DownstreamTask")
    return found


class FinetuneConfig(Section):
    """What `jobs/finetune.py` trains, and the backbone it starts from."""

    task: str = Field(
        "classify",
        description="a built-in task, or a class of your own",
        json_schema_extra={"type": "|".join((*TASKS, "package.module:Class"))},
    )
    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI, or timm name (`timm/<name>.<tag>`: with the hub's weights); "
        "none: student.name from scratch",
    )
    frozen: bool = Field(False, description="whether the backbone is frozen and only the head trains")
    backbone_lr: float = Field(
        1.0,
        gt=0,
        description="factor of the learning rate of the backbone; below 1, training keeps more of what it has learned",
    )
    schedule: Literal["cosine", "poly", "multistep"] = Field(
        "cosine", description="learning rate after warm-up: cosine, poly (power 0.9), or multistep at the milestones"
    )
    milestones: list[PositiveInt] = Field(
        [8, 11], description="epochs after which multistep divides the learning rate by 10"
    )
    epoch_steps: int = Field(0, ge=0, description="optimiser steps per epoch; 0: one pass over the images")
    data_workers: int | None = operational(
        None, ge=0, description="processes per training worker that prepare images; none: its CPUs less one"
    )
    pictures: int = operational(8, ge=0, description="number of held-out images drawn with their predictions")


class FinetuneJobConfig(ImageJobConfig):
    """`jobs/finetune.py`: a backbone and a head. :meth:`of_task` adds the section of the chosen task."""

    student: NamedBackboneConfig = NamedBackboneConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    root: ClassVar[Any] = None
    """The class from which a variant was made."""
    task: ClassVar[str] = ""
    """The task of a variant."""

    @classmethod
    def of_task(cls, task: str) -> type[Self]:
        """The variant with the section of a task.

        Raises:
            UserError: if there is no such task, or another section has its name.
        """
        return _of_task(cls, task)

    @classmethod
    def variants(cls) -> tuple[type[Self], ...]:
        """One for each built-in task."""
        return (cls,) if cls.root else tuple(map(cls.of_task, TASKS))

    @classmethod
    def select(cls, tree: Mapping[str, Any]) -> type[Self]:
        """The variant of `finetune.task`."""
        section = tree.get("finetune")
        task = section.get("task") if isinstance(section, Mapping) else None
        return cls if cls.root else cls.of_task(str(task or FinetuneConfig().task))

    def subject(self) -> list[str]:
        """The task, and the backbone."""
        return [self.finetune.task, self.finetune.student or f"{self.student.name.removeprefix('timm/')} from scratch"]

    def details(self) -> list[str]:
        """Images and training."""
        return [*super().details(), self.train.describe(self.student.input_size, self.seed, "finetune")]

    def shared_folders(self) -> dict[str, str]:
        """The checkpoints, if they are not in the work folder."""
        return self.train.shared_folders()

    def trainings(self) -> dict[str, TrainConfig]:
        """One."""
        return {"train": self.train}

    def __reduce__(self) -> Any:  # pickle cannot find a variant, as no module holds it
        return _restore, (type(self).root or type(self), type(self).task, self.model_dump())


@cache
def _of_task(root: Any, task: str) -> Any:
    if task in TASKS:
        name, section = task, TASKS[task].section
    else:
        own = import_task(task)
        name, section = own.name, own.section
    if name in root.model_fields:
        raise UserError(f"finetune.task: {task} is called {name}, which is another section of the configuration")
    fields: dict[str, Any] = {name: (section, section())}
    variant = cast(Any, create_model(f"{root.__name__}[{name}]", __base__=root, __doc__=root.__doc__, **fields))
    variant.root, variant.task = root, task
    return variant


def _restore(root: type[FinetuneJobConfig], task: str, tree: Mapping[str, Any]) -> FinetuneJobConfig:
    return root.of_task(task).model_validate(tree)


class EvaluateModelConfig(Section):
    """The fine-tuned model that is evaluated."""

    model: str | None = Field(None, description="fine-tuned model: MLflow model URI or the folder that finetune wrote")


class EvaluateModelJobConfig(FinetuneJobConfig):
    """`jobs/evaluate.py classify`, `segment` and `detect`: a fine-tuned model on held-out images."""

    evaluate: EvaluateModelConfig = EvaluateModelConfig()

    def subject(self) -> list[str]:
        """The model."""
        return [str(self.evaluate.model)]

    def details(self) -> list[str]:
        """The images."""
        return super().details()[:1]

    def shared_folders(self) -> dict[str, str]:
        """None: there are no checkpoints."""
        return {}

    def trainings(self) -> dict[str, TrainConfig]:
        """None."""
        return {}


class CocoResultsConfig(Section):
    """A file of detections, and the annotations that they are scored against."""

    annotations: str | None = Field(None, description="COCO JSON with the ground truth for evaluate.results")
    results: str | None = Field(None, description="detections in COCO's results format")


class CocoResultsJobConfig(JobConfig):
    """`jobs/evaluate.py coco-results`."""

    evaluate: CocoResultsConfig = CocoResultsConfig()
