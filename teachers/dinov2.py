"""DINOv2 (Oquab et al. 2024; registers: Darcet et al. 2024) through timm: `dinov2[/<variant>]`.

The summary is the normalised class token, the patches the normalised patch tokens without registers. At the default
224 px the grid is 16 x 16; loading resamples position tables from the published 518 px.
"""

from collections.abc import Mapping

from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOptions
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


def dinov2(options: TeacherOptions) -> Teacher:
    """Factory of DINOv2, by default ViT-B/14 with registers; files of weights have timm's keys or the authors' own."""
    variant, model = choose_variant("dinov2", options.variant, VARIANTS, DEFAULT)
    return TimmTeacher(f"dinov2/{variant}", model, options, input_size=INPUT_SIZE, key_filter=_to_timm)


def _to_timm(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """timm's own conversion from the authors' keys, and its resampling of the position table."""
    registers = "register_tokens" in tensors or "reg_token" in tensors
    if registers != (model.reg_token is not None):
        return tensors  # the check of the keys reports it better than timm, which fails on the position table
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(tensors, model)  # type: ignore[arg-type]
    return converted
