"""The neck: one feature map for dense distillation, from several levels of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FuseNeck(nn.Module):
    """Project each level to `dim` channels, resize it to the grid, and add.

    Coarser levels are up-sampled, as in EdgeSAM (Zhou et al. 2023, section 3.2), which fuses the levels of its CNN student
    this way for dense targets. The projection of a finer level down-samples it: its kernel is as large as its stride.

    Args:
        channels, strides: of the levels.
        stride: of the grid.
        dim: channels of the result.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], stride: int, dim: int) -> None:
        super().__init__()
        self.grid = list(strides).index(stride)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, side, side, bias=False), nn.BatchNorm2d(dim))
            for width, side in ((width, max(1, stride // own)) for width, own in zip(channels, strides, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, channels_l, h_l, w_l] of the levels -> [B, dim, h, w], the size of the level of the grid."""
        projected = [project(part) for project, part in zip(self.projections, maps, strict=True)]
        fused: Tensor = projected[self.grid]
        for number, part in enumerate(projected):
            if number != self.grid:
                fused = fused + _to(part, fused.shape[-2:])
        return fused


def _to(part: Tensor, size: Sequence[int]) -> Tensor:
    # A finer map of odd size down-samples to one row less than the grid has.
    return part if part.shape[-2:] == size else F.interpolate(part, list(size), mode="bilinear", align_corners=False)
