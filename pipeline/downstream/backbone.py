"""The backbone that fine-tuning starts from: an exported student, a model in MLflow, a timm model, or from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from pipeline.downstream.config import FinetuneJobConfig
from pipeline.errors import UserError, one_line
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import LoadedStudent, load_student
from pipeline.student.model import Encoder, load_encoder

PYRAMID = (4, 8, 16, 32)
"""Strides that segmentation and detection heads need."""


class FrozenEncoder(Encoder):
    """A frozen backbone: no gradients, and its norms keep their statistics in training."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.backbone)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode."""
        return super().train(False)


def find_start(config: FinetuneJobConfig, tracking_uri: str = "") -> LoadedStudent:
    """The backbone that `finetune.student` names: an exported student, a model in MLflow or a timm model; none: from scratch.

    Raises:
        UserError: if it is none of these, its weights cannot be loaded, or `student.weights` is set in its place.
    """
    if (weights := config.student.weights) != "random":
        raise UserError(
            f"student.weights sets the initial weights of a distillation: set finetune.student={weights} instead"
        )
    name = config.finetune.student or config.student.name
    tagged = "." in name.rpartition("/")[2]  # a tag names weights of the hub
    weights = "pretrained" if tagged else f"random:{config.seed}"
    try:
        return load_student(fetch_student(name, tracking_uri), weights=weights, args=config.student.args)
    except UserError as error:
        hint = "; leave its tag out to train from scratch" if tagged else ""
        raise UserError(f"finetune.student: {error}{hint}") from error


def load_start(folder: Path, frozen: bool) -> Encoder:
    """The exported backbone in a folder, in training mode."""
    encoder = load_encoder(folder).train()
    return FrozenEncoder(encoder) if frozen else encoder


def find_encoder(model: nn.Module) -> Encoder:
    """The backbone inside a model."""
    return cast(Encoder, model.get_submodule(encoder_name(model)))


def encoder_name(model: nn.Module) -> str:
    """The name of the backbone inside a model."""
    return next(name for name, module in model.named_modules() if isinstance(module, Encoder))


def check_input_size(model: nn.Module, size: tuple[int, int], whose: str) -> None:
    """Refuse a model (evaluation mode, CPU) that does not take images of this height and width in pixels.

    Raises:
        UserError: with `whose` (field and name of the model) and the reason that the model gives.
    """
    height, width = size
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = one_line(error).rstrip(".")
        raise UserError(
            f"{whose} takes no {height} x {width} images ({reason}): change student.input_size, or name another"
        ) from error


def pyramid_levels(encoder: Encoder) -> list[int]:
    """The last level of each of the strides 4, 8, 16, 32.

    Raises:
        UserError: if the backbone lacks one.
    """
    found = {stride: level for level, stride in enumerate(encoder.strides)}
    if not set(PYRAMID) <= set(found):
        raise UserError(
            f"the backbone has maps at strides {', '.join(map(str, sorted(found)))}; segmentation and detection need "
            f"{', '.join(map(str, PYRAMID))}: take a hierarchical one, such as regla_m"
        )
    return [found[stride] for stride in PYRAMID]
