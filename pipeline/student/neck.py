"""The neck: one feature map for dense distillation, from several levels of the pyramid."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FuseNeck(nn.Module):
    """Project each level to `dim` channels, resize it to the grid of stride `stride`, and add.

    Coarser levels are up-sampled, as in EdgeSAM (Zhou et al. 2023, section 3.2). The projection of a finer level down-samples
    it: its kernel is as large as its stride.
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
        fused: Tensor = projected.pop(self.grid)
        size = fused.shape[-2:]
        for part in projected:
            # A finer map of odd size down-samples to one row less than the grid has.
            if part.shape[-2:] != size:
                part = F.interpolate(part, size, mode="bilinear", align_corners=False)
            fused = fused + part
        return fused
