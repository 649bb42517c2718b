"""Evaluations of frozen features."""

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.cache.config import CacheJobConfig
from pipeline.config.tree import Section
from pipeline.student.config import BackboneConfig


class KnnConfig(Section):
    """Weighted k-nearest-neighbour classification of the held-out images."""

    k: int = Field(20, ge=1, description="neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")
    bank: int = Field(50_000, ge=1, description="maximum number of training images in the bank, evenly spaced")
    batch_size: int = Field(256, ge=1, description="images per forward pass of the student")


class EvaluateConfig(Section):
    """The frozen backbone that is evaluated, and how."""

    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI (models:/m-...), or timm name (regla_m, timm/<name>)",
    )
    weights: str = Field(
        "pretrained",
        description="weights of a timm name (with student.args): pretrained, random[:seed], or a checkpoint file",
    )
    input_size: int | None = Field(
        None,
        ge=16,
        description="side of the input in pixels; none: that of the exported student, else student.input_size",
    )
    ks: list[PositiveInt] = Field(
        [10, 20, 100, 200], min_length=1, description="numbers of neighbours that vote in `knn`"
    )
    lrs: list[PositiveFloat] = Field(
        [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        min_length=1,
        description="learning rates of the linear classifiers, trained together; the best on data.val is reported",
    )
    epochs: int = Field(30, ge=1, description="passes over the training features in `linear` and `seg-probe`")
    batch_size: int = Field(256, ge=1, description="images per step in `linear`; `seg-probe` uses at most 16")
    grid: int | None = Field(
        None, ge=1, description="side of the feature map in `seg-probe`; none: that of the student's stride-16 map"
    )


class EvaluateJobConfig(CacheJobConfig):
    """`jobs/evaluate.py knn`, `linear` and `seg-probe`: a frozen backbone on features that the cache keeps."""

    student: BackboneConfig = BackboneConfig()
    knn: KnnConfig = KnnConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def subject(self) -> list[str]:
        """The backbone."""
        return [str(self.evaluate.student)]
