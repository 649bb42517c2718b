"""The student, as each kind of job reads it."""

from typing import Any, Literal

from pydantic import Field

from pipeline.config.tree import Section


class BackboneConfig(Section):
    """How to build and feed a network that another field names."""

    input_size: int = Field(256, ge=16, description="side of the student's input in pixels")
    args: dict[str, Any] = Field({}, description="arguments passed to timm.create_model")


class NamedBackboneConfig(BackboneConfig):
    """A network and its initial weights."""

    name: str = Field("regla_t", description="regla_t, regla_s, regla_m, regla_l, regla_xl, or timm/<name>")
    weights: str = Field(
        "random",
        min_length=1,
        description="initial weights of a distillation: random (by seed), pretrained (timm's), a checkpoint file, or an exported "
        "student: its folder, address or MLflow URI",
    )


class StudentConfig(NamedBackboneConfig):
    """The network that learns."""

    token_dim: int = Field(256, ge=1, description="channels of the fused feature map that the patch heads read")
    taps: list[Literal[4, 8, 16, 32]] = Field(
        [16, 32],
        min_length=1,
        description="strides that the neck fuses into one feature map of stride 16; 16 is always included",
    )
    head_dim: int = Field(1024, ge=1, description="hidden channels of the distillation heads")
    keep_heads: bool = Field(False, description="also export neck and heads")
