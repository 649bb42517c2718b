"""What every fine-tuning has in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

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
