"""Losses and augmentation."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from pipeline.cache.config import Decoder, PhotometricConfig, PrecomputeJobConfig, ResolutionConfig
from pipeline.config.tree import Section, Share
from pipeline.evaluate.config import KnnConfig
from pipeline.student.config import StudentConfig
from pipeline.training.config import TrainConfig


class MasksConfig(Section):
    """Prompts of the mask losses, which `mask_weight` of a SAM teacher turns on: see pipeline/distill/masks.py."""

    prompts: int = Field(8, ge=1, description="random prompts per image and step, points and boxes")
    iterations: int = Field(
        2, ge=1, description="times a prompt is decoded; each after the first adds a point where the masks differ"
    )


class LossConfig(Section):
    """How the student's predictions are compared with the teachers' features: see pipeline/distill/loss.py."""

    standardise: Literal["mean_std", "phi_s"] = Field(
        "mean_std", description="targets: divided by each channel's deviation, or rotated to one scale (PHI-S)"
    )
    patches: dict[str, NonNegativeFloat] = Field(
        {"cosine": 0.9, "smooth_l1": 0.1},
        min_length=1,
        description="weight of each patch loss: cosine, smooth_l1, mse, patch_relation, or package.module:function",
    )
    summary: dict[str, NonNegativeFloat] = Field(
        {"cosine": 1.0},
        min_length=1,
        description="weight of each summary loss: cosine, smooth_l1, mse, relation, or package.module:function",
    )
    max_patches: int | None = Field(
        64,
        ge=1,
        description="maximum number of patches of an image compared per step; the next step takes others; none: all",
    )
    queue: int = Field(4096, ge=1, description="past summaries of each teacher that relation compares with")
    temperature: float = Field(0.07, gt=0, description="softmax temperature of relation and patch_relation")
    drop: Share = Field(
        0.0, description="probability of dropping every teacher but the one with the highest loss, by image"
    )
    masks: MasksConfig = MasksConfig()


class AugmentConfig(PhotometricConfig):
    """Photometric augmentation of the student's images; teachers see the clean view."""


def training_names(phases: int) -> list[str]:
    """Where the checkpoints of each of so many phases lie in the folder of a run."""
    return [f"train/phase-{number}" for number in range(1, phases + 1)] if phases > 1 else ["train"]


class DistillTrainConfig(TrainConfig):
    """The training run of a distillation, which reads its images from the cache."""

    decoder: Decoder = Field(
        "cpu",
        description="what decodes the student's training images: cpu, or nvjpeg (JPEGs on the GPU; other pixels)",
    )


class DistillJobConfig(PrecomputeJobConfig):
    """`jobs/distill.py`: a student that learns from cached features."""

    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    train: DistillTrainConfig = DistillTrainConfig()
    knn: KnnConfig = KnnConfig()

    @model_validator(mode="after")
    def _resolutions_differ(self) -> Self:
        for number, resolution in enumerate(self.resolutions):
            if resolution.input_size == self.student.input_size:
                raise ValueError(
                    f"resolutions.{number}.input_size: {resolution.input_size} is student.input_size already"
                )
        return self

    def at_resolution(self, resolution: ResolutionConfig) -> Self:
        """The configuration at a further input size."""
        student = self.student.model_copy(update={"input_size": resolution.input_size})
        return super().at_resolution(resolution).model_copy(update={"student": student})

    def subject(self) -> list[str]:
        """The student and its teachers."""
        return [self.student.name.removeprefix("timm/"), *(f"from {teachers}" for teachers in super().subject())]

    def details(self) -> list[str]:
        """Images, initial weights, teachers and training."""
        images, *teachers = super().details()
        weights = self.student.weights
        initial = [f"The student starts from the weights `{weights}`."] if weights != "random" else []
        return [images, *initial, *teachers, self.train.describe(self.student.input_size, self.seed, "distill")]

    def shared_folders(self) -> dict[str, str]:
        """Cache and checkpoints, if they are not in the work folder."""
        found = super().shared_folders() | self.train.shared_folders()
        for number, phase in enumerate(self.phase_configs()):
            for field, folder in phase.train.shared_folders().items():
                if found.get(field) != folder:
                    found[f"phases.{number}.{field}"] = folder
        return found

    def trainings(self) -> dict[str, TrainConfig]:
        """One for each phase."""
        phases = self.phase_configs()
        return {name: phase.train for name, phase in zip(training_names(len(phases)), phases, strict=True)}
