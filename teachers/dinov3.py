"""DINOv3 (Siméoni et al. 2025) and EUPE as their authors compute them, through timm: `timm/vit_*_dinov3*`.

The summary is the normalised class token; timm averages the patches unless it is told. Positions are rotary: no table is
resampled. Of most sizes timm has two models: `*_dinov3_qkvb` with the biases of queries and values, and `*_dinov3`
without. The authors' published biases are all zero (facebookresearch/dinov3, issue 195), so both compute the same with
them; a file with other biases is refused by the model without.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from teachers.base import TeacherOptions, TeacherOutput, pool_grid
from teachers.timm_backbone import TimmTeacher

REGISTERS = "storage_tokens"
"""Key that marks a file of the authors."""


class DINOv3(TimmTeacher):
    """A DINOv3 of timm whose summary is the class token; `weights` may be a file of the authors."""

    def __init__(self, name: str, model_name: str, options: TeacherOptions) -> None:
        options = replace(options, args={"global_pool": "token", **options.args})
        super().__init__(name, model_name, options, key_filter=_to_timm)


def _to_timm(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """timm's own conversion from the authors' keys; raises a ValueError where it would drop biases that are not zero."""
    if REGISTERS not in tensors:
        return tensors
    if "blocks.0.attn.q_bias" not in model.state_dict():
        for key in [key for key in tensors if key.endswith("attn.qkv.bias")]:
            query, _, value = tensors.pop(key).chunk(3)  # the key's is masked
            if not query.is_meta and (query.any() or value.any()):
                raise ValueError(
                    f"{key} is not zero, and this model has no biases of queries and values: use its _qkvb"
                )
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(tensors, model)
    return converted


class DINOv3ConvNeXt(TimmTeacher):
    """A ConvNeXt of DINOv3, whose authors put the final norm on every patch and on the mean; timm has it on the mean alone."""

    def _computation(self) -> str:
        return "patches: after the final norm"

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] -> summary [B, D_s], patches [B, h, w, D]."""
        model: Any = self.model
        summary, patches = self.read(model, images)
        normalised = model.head.norm(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return TeacherOutput(summary, pool_grid(normalised, self.pool))
