"""What every fine-tuning has in common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import Field, PositiveInt, create_model

from pipeline.config.tree import Section, operational
from pipeline.downstream.classify.config import ClassifyConfig
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.runs.config import ImageJobConfig, JobConfig
from pipeline.student.config import NamedBackboneConfig
from pipeline.training.config import TrainConfig

S = TypeVar("S", bound=Section)

TASK_SECTIONS: dict[str, type[Section]] = {
    "classify": ClassifyConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
}
"""The section of each built-in task, by the task's name, which is also the section's."""


class FinetuneConfig(Section):
    """What `jobs/finetune.py` trains, and from what."""

    task: Literal["classify", "segment", "detect"] = Field("classify", description="classify, segment or detect")
    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI, or timm name (`timm/<name>.<tag>`: with the hub's weights); "
        "none: student.name from scratch",
    )
    frozen: bool = Field(False, description="whether the backbone stays as it is and the head alone learns")
    schedule: Literal["cosine", "poly", "multistep"] = Field(
        "cosine", description="learning rate after the warm-up: cosine, poly (power 0.9), or steps at the milestones"
    )
    milestones: list[PositiveInt] = Field(
        [8, 11], description="epochs after which multistep divides the learning rate by 10"
    )
    epoch_steps: int = Field(0, ge=0, description="optimiser steps that make an epoch; 0: one pass over the images")
    data_workers: int | None = operational(
        None, ge=0, description="processes that prepare images, per training worker; none: its CPUs less one"
    )
    pictures: int = operational(8, ge=0, description="held-out images that are drawn with their predictions")


def task_section(task: str) -> tuple[str, type[Section]] | None:
    """The name and the class of a task's section; None for a task that does not exist."""
    return (task, TASK_SECTIONS[task]) if task in TASK_SECTIONS else None


class FinetuneJobConfig(ImageJobConfig):
    """`jobs/finetune.py`: a backbone and a head. :meth:`of_task` adds the section of the chosen task."""

    student: NamedBackboneConfig = NamedBackboneConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    root: ClassVar[Any] = None
    """The class that a variant was made from."""
    task: ClassVar[str] = ""
    """The task of a variant."""

    @classmethod
    def of_task(cls, task: str) -> type[Self]:
        """The variant with the section of a task."""
        return _of_task(cls, task)

    @classmethod
    def variants(cls) -> tuple[type[Self], ...]:
        """One for each built-in task."""
        return (cls,) if cls.root else tuple(map(cls.of_task, TASK_SECTIONS))

    @classmethod
    def select(cls, tree: Mapping[str, Any]) -> type[Self]:
        """The variant of `finetune.task`."""
        section = tree.get("finetune")
        task = section.get("task") if isinstance(section, Mapping) else None
        return cls if cls.root else cls.of_task(str(task or FinetuneConfig().task))

    def section(self, kind: type[S]) -> S:
        """The section of this class.

        Raises:
            LookupError: where the chosen task has another one.
        """
        for _, value in self:
            if isinstance(value, kind):
                return value
        raise LookupError(f"{type(self).__name__} has no {kind.__name__}")

    def subject(self) -> list[str]:
        """The task, and the backbone."""
        return [self.finetune.task, self.finetune.student or f"{self.student.name.removeprefix('timm/')} from scratch"]

    def details(self) -> list[str]:
        """Images and training."""
        return [*super().details(), self.train.describe(self.student.input_size, self.seed, "finetune")]

    def shared_folders(self) -> dict[str, str]:
        """The checkpoints, if they are not in the work folder."""
        return self.train.shared_folders()

    def __reduce__(self) -> Any:  # a variant is no attribute of a module, as pickle wants it
        return _restore, (type(self).root or type(self), type(self).task, self.model_dump())


@cache
def _of_task(root: Any, task: str) -> Any:
    found = task_section(task)
    if found is None:
        return root
    name, section = found
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


class CocoResultsConfig(Section):
    """Detections in a file, and what they are compared with."""

    annotations: str | None = Field(None, description="COCO JSON that evaluate.results are held against")
    results: str | None = Field(None, description="detections in COCO's results format")


class CocoResultsJobConfig(JobConfig):
    """`jobs/evaluate.py coco-results`."""

    evaluate: CocoResultsConfig = CocoResultsConfig()
