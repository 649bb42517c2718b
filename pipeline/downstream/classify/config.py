"""The section of image classification."""

from pydantic import Field

from pipeline.config.tree import Section


class ClassifyConfig(Section):
    """Image classification; the side of the input is student.input_size."""

    augment: str | None = Field(
        "rand-m9-mstd0.5-inc1", description="timm's policy (RandAugment, AutoAugment, AugMix ...); none: colour jitter"
    )
    min_area: float = Field(0.08, gt=0, le=1, description="smallest share of the image's area in a training crop")
    mixup: float = Field(0.8, ge=0, description="alpha of Mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0: none")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    erase: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    crop_share: float = Field(
        0.95, gt=0, le=1, description="side of the centre crop as a share of the resized image's side"
    )
    teacher: str | None = Field(
        None,
        description="fine-tuned classifier of the same classes (folder, address or MLflow URI) whose probabilities go "
        "into the targets; none: only labels",
    )
    teacher_share: float = Field(0.5, gt=0, le=1, description="share of the teacher's probabilities in the targets")
