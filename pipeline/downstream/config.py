"""Fine-tuning, and what each downstream task adds."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
)

from pipeline.config.tree import Section


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
    data_workers: int | None = Field(
        None, ge=0, description="processes that prepare images, per training worker; none: its CPUs less one"
    )
    pictures: int = Field(8, ge=0, description="held-out images that are drawn with their predictions")


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
    crop_share: float = Field(0.95, gt=0, le=1, description="share of the resized image's side in the centre crop")
    teacher: str | None = Field(
        None,
        description="fine-tuned classifier of the same classes (folder, address or MLflow URI) whose probabilities go "
        "into the targets; none: labels alone",
    )
    teacher_share: float = Field(0.5, gt=0, le=1, description="share of the teacher's probabilities in the targets")


class SegmentConfig(Section):
    """Semantic segmentation; the side of a training crop, and of a sliding window, is student.input_size."""

    classes: str | None = Field(None, description="file of class names: one a line, or a table with a name column")
    reduce_zero_label: bool = Field(False, description="whether mask value 0 is ignored and classes count from 1")
    train_masks: str | None = Field(
        None, description="folder of the masks of data.train; none: its path with `images` as `annotations` or `masks`"
    )
    val_masks: str | None = Field(None, description="the same of data.val")
    size: int = Field(512, ge=16, description="short side in pixels that images are resized to, jitter apart")
    scales: list[PositiveFloat] = Field(
        [0.5, 2.0], min_length=2, max_length=2, description="smallest and largest factor of the scale jitter"
    )
    inference: Literal["whole", "slide"] = Field("whole", description="the whole image at once, or sliding windows")
    channels: int = Field(
        128, ge=32, multiple_of=32, description="channels of the Semantic FPN head; its pyramid has twice"
    )


class DetectConfig(Section):
    """Detection and instance segmentation."""

    train_annotations: str | None = Field(
        None, description="COCO JSON of data.train; none: ../annotations/instances_<folder>.json beside the folder"
    )
    val_annotations: str | None = Field(None, description="the same of data.val")
    sizes: list[PositiveInt] = Field(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        min_length=1,
        description="short sides in pixels that training images are resized to; the last one in evaluation",
    )
    max_size: int = Field(1333, ge=32, description="largest long side in pixels")
    masks: bool = Field(
        True, description="whether instance masks are learned (Mask R-CNN), or boxes alone (Faster R-CNN)"
    )
    anchor: int = Field(
        32, ge=1, description="side of the smallest anchor in pixels; it doubles at each of five levels"
    )
    channels: int = Field(
        256, ge=8, description="channels of the pyramid and the mask head; the box head has four times as many"
    )
