"""The backbone that fine-tuning starts from: an exported student, a model in MLflow, a timm model, or from scratch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.student.model import Encoder, create_backbone, load_encoder, save_encoder

PYRAMID = (4, 8, 16, 32)
"""Strides that dense heads are built on."""


class FrozenEncoder(Encoder):
    """A backbone that stays as it is: no gradients, and its norms keep their statistics in training."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.backbone)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def maps(self, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """As :meth:`Encoder.maps`, without gradients."""
        return super().maps(images, levels)


@dataclass(frozen=True)
class Start:
    """A backbone with its weights, and the timm name and arguments that it is built by."""

    encoder: Encoder
    model: str
    args: dict[str, Any]

    def save(self, input_size: int, folder: Path) -> None:
        """Write an exported student, so that workers neither download nor draw weights."""
        save_encoder(self.encoder, self.model, self.args, input_size, folder)


def find_start(config: Config, downloaded: Path | None = None) -> Start:
    """What `finetune.student` names.

    Args:
        downloaded: exported student that came from MLflow, where it names one.

    Raises:
        UserError: where it is neither an exported student nor a timm model, or its weights cannot be had.
    """
    name = config.finetune.student
    exported = downloaded or (Path(name) if name and Path(name).is_dir() else None)
    if exported is not None:
        encoder = load_encoder(exported)
        described = json.loads((exported / "student.json").read_text(encoding="utf-8"))
        return Start(encoder, described["model"], described["args"])
    model, args = (name or config.student.name).removeprefix("timm/"), config.student.args
    return Start(_timm_encoder(model, args, config.seed), model, args)


def _timm_encoder(model: str, args: dict[str, Any], seed: int) -> Encoder:
    if "/" in model or model.startswith((".", "~")):
        raise UserError(f"finetune.student: {model} is neither the folder of an exported student nor a timm name")
    if "." in model:  # a tag names weights
        return Encoder(_pretrained(model, args))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(create_backbone(model, args))


def _pretrained(model: str, args: dict[str, Any]) -> nn.Module:
    create_backbone(model.split(".")[0], args)  # names what is wrong with the model or its arguments
    try:
        return timm.create_model(model, pretrained=True, **{"num_classes": 0, **args})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"finetune.student: the weights of {model} cannot be had ({' '.join(str(error).split())[:160]}); "
            "leave its tag out to train from scratch"
        ) from error


def load_start(folder: Path, frozen: bool) -> Encoder:
    """The backbone that :meth:`Start.save` wrote, in training mode."""
    encoder = load_encoder(folder).train()
    return FrozenEncoder(encoder) if frozen else encoder


def pyramid_levels(encoder: Encoder) -> list[int]:
    """The last level of each of the strides 4, 8, 16, 32.

    Raises:
        UserError: where the backbone lacks one.
    """
    found = {stride: level for level, stride in enumerate(encoder.strides)}
    if not set(PYRAMID) <= set(found):
        raise UserError(
            f"the backbone has maps at strides {', '.join(map(str, sorted(found)))}; segmentation and detection need "
            f"{', '.join(map(str, PYRAMID))}: take a hierarchical one, such as regla_m"
        )
    return [found[stride] for stride in PYRAMID]
