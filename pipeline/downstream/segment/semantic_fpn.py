"""The Semantic FPN head: Kirillov et al. 2019, Panoptic Feature Pyramid Networks, section 3.1 and figure 3."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pipeline.downstream.backbone import pyramid_levels
from pipeline.student.model import Encoder


class SemanticFPN(nn.Module):
    """A feature pyramid; its levels are upsampled to stride 4, summed, and classified pixel by pixel.

    Args:
        encoder: with maps at strides 4, 8, 16 and 32.
        classes: number K of classes.
        channels: of the branches (128 in the paper); the pyramid has twice as many.
    """

    def __init__(self, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.levels = encoder, pyramid_levels(encoder)
        self.pyramid = FeaturePyramidNetwork([encoder.channels[level] for level in self.levels], 2 * channels)
        self.branches = nn.ModuleList(_branch(depth, channels) for depth in (1, 1, 2, 3))
        self.dropout = nn.Dropout2d(0.1)  # as in mmsegmentation's FPNHead
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in [0, 1] -> logits [B, K, H, W]."""
        maps = self.encoder.maps(images, self.levels)
        pyramid = list(self.pyramid(OrderedDict(zip("abcd", maps, strict=True))).values())
        sizes = [level.shape[-2:] for level in pyramid]
        total = pyramid[0].new_zeros(())
        for level, branch in enumerate(self.branches):
            x = pyramid[level]
            for step, block in enumerate(branch.children(), start=1):
                x = F.interpolate(block(x), size=sizes[max(0, level - step)], mode="bilinear", align_corners=False)
            total = total + x
        logits = self.classify(self.dropout(total))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _branch(depth: int, channels: int) -> nn.ModuleList:
    return nn.ModuleList(_block(width, channels) for width in [2 * channels] + [channels] * (depth - 1))


def _block(inputs: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(min(32, channels // 2), channels), nn.ReLU(inplace=True))
