"""torchvision's Mask R-CNN (He et al. 2017) and Faster R-CNN on a feature pyramid over any hierarchical backbone."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.downstream.backbone import pyramid_levels
from pipeline.downstream.detect.config import DetectConfig
from pipeline.student.model import Encoder

HIDDEN = 4
"""Channels of the box head per channel of the pyramid: 1024 for 256, as published."""


class PyramidBody(nn.Module):
    """Backbone and feature pyramid (Lin et al. 2017): levels "0" to "3" at strides 4 to 32, and "pool" at 64."""

    def __init__(self, encoder: Encoder, channels: int) -> None:
        super().__init__()
        self.encoder, self.levels, self.out_channels = encoder, pyramid_levels(encoder), channels
        widths = [encoder.channels[level] for level in self.levels]
        self.pyramid = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, normalised: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W], normalised by the backbone's own mean and deviation -> float32 maps by level."""
        # The detector pads with zeros, which must mean the mean colour; the encoder normalises by itself.
        pixels = normalised * self.encoder.std + self.encoder.mean
        maps = self.encoder.maps(pixels, self.levels)
        levels: dict[str, Tensor] = self.pyramid(OrderedDict(zip("0123", maps, strict=True)))
        # Anchors take the dtype of the maps: in bfloat16 they would lie on steps of 8 pixels above 1024.
        return {name: level.float() for name, level in levels.items()}


class ProposalHead(RPNHead):
    """torchvision's head of region proposals, in float32 under autocast too: its boxes are decoded in its dtype."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] of each level -> objectness [B, A, H, W] and box deltas [B, 4 A, H, W], float32."""
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


def build_detector(encoder: Encoder, classes: int, settings: DetectConfig) -> FasterRCNN:
    """A detector that takes images [3, H, W] in [0, 1]; label 0 is the background.

    Training images come resized; in evaluation the detector resizes them and returns results in their own pixels.
    """
    body, hidden = PyramidBody(encoder, settings.channels), HIDDEN * settings.channels
    anchors = AnchorGenerator(tuple((settings.anchor * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    common = {
        "min_size": settings.sizes[-1],
        "max_size": settings.max_size,
        "image_mean": encoder.mean.flatten().tolist(),
        "image_std": encoder.std.flatten().tolist(),
        "rpn_anchor_generator": anchors,
        "rpn_head": ProposalHead(settings.channels, anchors.num_anchors_per_location()[0]),
        "box_head": TwoMLPHead(settings.channels * 7**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
        "_skip_resize": True,
    }
    if not settings.masks:
        return FasterRCNN(body, **common)
    return MaskRCNN(
        body,
        mask_head=MaskRCNNHeads(settings.channels, (settings.channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(settings.channels, settings.channels, classes + 1),
        **common,
    )
