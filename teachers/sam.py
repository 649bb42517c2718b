"""SAM image encoders (Kirillov et al. 2023, "Segment Anything") through timm: `sam[/<variant>]`.

There is no summary. Patches are the neck's 256 channels; at 1024 px the 64 x 64 grid is averaged exactly to 16 x 16.
For a smaller input the squares shrink with it: the grid stays 16 x 16 as long as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.vision_transformer_sam import checkpoint_filter_fn
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOptions
from teachers.timm_backbone import TimmTeacher
from teachers.variants import choose

VARIANTS = {f"vit_{size[0]}": f"samvit_{size}_patch16.sa1b" for size in ("base", "large", "huge")}
DEFAULT = "vit_b"
INPUT_SIZE = 1024
PATCH = 16
GRID = 16
NORM_EPS = 1e-6


class SAM(TimmTeacher):
    """A SAM image encoder with the authors' epsilon in every norm; timm's own is 1e-5 in the blocks."""

    def _create(self, **changes: Any) -> nn.Module:
        model = super()._create(**changes)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = NORM_EPS
        return model


def sam(options: TeacherOptions) -> Teacher:
    """Factory of SAM; without a variant it is ViT-B.

    `weights` may be a file in timm's layout or in the authors' own, whose prompt encoder and mask decoder are left out.
    """
    variant, model = choose("sam", options.variant, VARIANTS, DEFAULT)
    size = options.input_size or INPUT_SIZE
    side = size // PATCH
    pool = side // GRID if side >= GRID and side % GRID == 0 else 1
    # The tables are made for the published size; timm resamples them to the input's in every forward.
    options = replace(options, args={"img_size": INPUT_SIZE, **options.args})
    return SAM(f"sam/{variant}", model, options, has_summary=False, pool=pool, key_filter=_to_timm)


def _to_timm(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(tensors, model)
    return converted
