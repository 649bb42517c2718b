"""DINOv2 (Oquab et al. 2024; registers: Darcet et al. 2024) through timm: `dinov2[/<variant>]`.

The summary is the normalised class token, the patches the normalised patch tokens without registers. At the default
224 px the grid is 16 x 16; loading resamples position tables from the published 518 px, as the authors do:

- without registers by bicubic interpolation without antialiasing, whose scale is that of a side longer by `OFFSET`;
- with registers (`interpolate_antialias=True`, `interpolate_offset=0.0` in the authors' hub) antialiased, to the exact
  side; this is timm's way as well.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from teachers.base import Teacher, TeacherError, TeacherOptions
from teachers.timm_backbone import TimmTeacher
from teachers.variants import choose_variant

SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}
VARIANTS = {
    name + suffix: f"vit_{size}_patch14_{registers}dinov2.lvd142m"
    for name, size in SIZES.items()
    for suffix, registers in (("", ""), ("_reg", "reg4_"))
}
DEFAULT = "vitb14_reg"
INPUT_SIZE = 224
OFFSET = 0.1


def dinov2(options: TeacherOptions) -> Teacher:
    """Factory of DINOv2; the default variant is ViT-B/14 with registers.

    `weights` may be a file with timm's keys, with the authors' own, or of a training with their code.
    """
    variant, model = choose_variant("dinov2", options.variant, VARIANTS, DEFAULT)
    return DINOv2(f"dinov2/{variant}", model, options, input_size=INPUT_SIZE)


class DINOv2(TimmTeacher):
    """A DINOv2 of timm, with the authors' resampling of the position table."""

    def __init__(self, name: str, model_name: str, options: TeacherOptions, *, input_size: int | None = None) -> None:
        self.registers = "_reg" in model_name
        if not self.registers and (given := {"img_size", "dynamic_img_size"} & options.args.keys()):
            raise TeacherError(f"teacher {name}: args.{min(given)}: set input_size, which resamples as the authors do")
        super().__init__(name, model_name, options, input_size=input_size, key_filter=_to_timm)

    def _computation(self) -> str:
        published = self.source.kind == "hub" and "img_size" not in self.model_args  # no table is resampled
        if self.registers or published or self.source.kind == "random":
            return ""
        return f"positions: bicubic, offset {OFFSET}"

    def _create_published(self) -> nn.Module:
        assert self.hub_file
        model = self._create()
        model.load_state_dict(self._read_file(model, self.hub_file.fetch(), "cpu"))
        return model


def _to_timm(tensors: dict[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    """timm's own conversion from the authors' keys, after resampling the position table."""
    registers = "register_tokens" in tensors or "reg_token" in tensors
    if registers != (model.reg_token is not None):
        return tensors  # the check of the keys reports it better than timm, which fails on the position table
    if not registers and "pos_embed" in tensors:
        side = model.patch_embed.grid_size[0]
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"].float(), side)
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(tensors, model)
    return converted


def resample_positions(table: Tensor, side: int) -> Tensor:
    """Resample a position table as DINOv2 without registers does (`interpolate_pos_encoding`).

    Output place i lies at (i + 1/2) / s - 1/2 of the old grid of side n, with s = (side + `OFFSET`) / n rather than
    side / n; values are interpolated bicubically (a = -0.75), without antialiasing.

    Args:
        table: [1, 1 + n^2, D], the class token first.

    Returns:
        [1, 1 + side^2, D].

    Raises:
        ValueError: if the places are no square.
    """
    prefix, places = table[:, :1], table[:, 1:]
    old = isqrt(places.shape[1])
    if old**2 != places.shape[1]:
        raise ValueError(f"its position table has {places.shape[1]} places, which are no square")
    if old == side:
        return table
    grid = places.transpose(1, 2).unflatten(2, (old, old))
    scale = (side + OFFSET) / old
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1)
