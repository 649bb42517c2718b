"""The neck: student tokens for dense distillation, from two levels of the pyramid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FuseNeck(nn.Module):
    """Project stride 16 and stride 32 to `dim` channels, up-sample the coarser, and add.

    As in EdgeSAM (Zhou et al. 2023, section 3.2), which fuses the levels of its CNN student this way for dense targets.

    Args:
        fine_dim, coarse_dim: channels of the two maps.
        dim: channels of the tokens.
    """

    def __init__(self, fine_dim: int, coarse_dim: int, dim: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(fine_dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.coarse = nn.Sequential(nn.Conv2d(coarse_dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """[B, fine_dim, h, w] and [B, coarse_dim, h / 2, w / 2] -> [B, dim, h, w]."""
        fused: Tensor = self.fine(fine)
        return fused + F.interpolate(self.coarse(coarse), size=fused.shape[-2:], mode="bilinear", align_corners=False)
