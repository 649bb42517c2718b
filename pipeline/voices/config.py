"""Evaluations of what a student can do with the heads of its teachers."""

from typing import Any

from pydantic import Field

from pipeline.config.tree import Section
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.runs.config import JobConfig


class WordsConfig(Section):
    """The CLIP head of a student, the text tower beside it, and the texts."""

    teacher: str | None = Field(None, description="label of the CLIP teacher, if the student keeps heads of several")
    text_weights: str | None = Field(
        None,
        description="weights of the text tower: pretrained, random[:seed], or a checkpoint file with both towers; none: the "
        "teacher's published ones",
    )
    classes: str | None = Field(
        None,
        description='names of the classes by label: "a cat, a dog", a .txt file with one on each line, or `imagenet` (the 1,000 '
        "that open_clip ships); none: those of data.val",
    )
    templates: list[str] = Field(
        ["openai"],
        min_length=1,
        description="`openai` (the 80 for ImageNet), `simple` (7 of them), or texts with {} for the class; their embeddings "
        "are averaged",
    )
    captions: str | None = Field(
        None, description="captions of data.val in COCO's layout (captions_val2017.json), for `retrieval`"
    )


class WordsJobConfig(EvaluateJobConfig):
    """`jobs/evaluate.py zero-shot` and `retrieval`: a student's CLIP head beside its teacher's own figures."""

    words: WordsConfig = WordsConfig()


class CorrespondenceConfig(Section):
    """Key points that a student finds again in a second image."""

    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI (models:/m-...), or timm name (regla_m, timm/<name>)",
    )
    weights: str = Field(
        "pretrained", description="weights of a timm name: pretrained, random[:seed], or a checkpoint file"
    )
    teacher: str | None = Field(
        None,
        description="label of the teacher whose head is used, or `backbone`; none: the DINOv2 or DINOv3 head, and for a timm "
        "name the backbone",
    )
    input_size: int | None = Field(
        None, ge=16, description="side of the input in pixels; none: as the student was trained, else 224"
    )
    pairs: str = Field(
        "samples",
        description="folder in SPair-71k's layout, or `samples`: generated scenes, and the same moved and recoloured",
    )
    split: str = Field("test", description="split of SPair-71k: the folder below PairAnnotation")
    samples: int = Field(200, ge=1, description="number of generated pairs")
    sample_size: int = Field(224, ge=32, description="side of generated images in pixels")


class CorrespondenceJobConfig(JobConfig):
    """`jobs/evaluate.py correspondence`: the percentage of correct key points."""

    correspondence: CorrespondenceConfig = CorrespondenceConfig()

    def subject(self) -> list[str]:
        """The student."""
        return [str(self.correspondence.student)]


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
