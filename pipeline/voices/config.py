"""Evaluations of what a student can do with the heads of its teachers."""

from typing import Any

from pydantic import Field

from pipeline.config.tree import Section
from pipeline.evaluate.config import EvaluateJobConfig


class PromptsConfig(Section):
    """The SAM head of a student, the SAM beside it, and the objects that are prompted for."""

    sam: str = Field(
        "pretrained",
        description="weights of the SAM that taught the student: pretrained, random[:seed], or a checkpoint file with prompt "
        "encoder and mask decoder",
    )
    sam_size: int | None = Field(None, ge=16, description="side of the teacher's input in pixels; none: as published")
    sam_args: dict[str, Any] = Field({}, description="arguments of the teacher's image encoder, as in teachers.N.args")
    annotations: str | None = Field(
        None, description="instance masks of data.val in COCO's format (instances_val2017.json); none: generated scenes"
    )
    limit: int | None = Field(None, ge=1, description="number of images that are measured, evenly spaced; none: all")


class PromptsJobConfig(EvaluateJobConfig):
    """`jobs/evaluate.py promptable`: masks of a student's SAM head from ground-truth boxes, beside those of SAM itself."""

    prompts: PromptsConfig = PromptsConfig()
