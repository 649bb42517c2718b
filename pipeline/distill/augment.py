"""Photometric augmentation of the student's images on the training device, with separate random values for each image.

Teachers see the clean view, and its geometry is not changed. The operations are those of torchvision.transforms.v2, which
draws one value for a whole batch; calling it image by image would launch too many kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from pipeline.distill.config import AugmentConfig
from pipeline.training.task import to_device

BLUR_SIGMA = (0.1, 2.0)  # range of the blur's standard deviation in pixels, as in DINO (Caron et al. 2021)
BLUR_SIDE = 9  # of the blur's kernel in pixels, as in DINOv2


@dataclass(frozen=True)
class Draws:
    """Random values of each image of a batch; [B, 1, 1, 1] float32 each."""

    brightness: Tensor  # factor
    contrast: Tensor  # factor
    saturation: Tensor  # factor
    hue: Tensor  # shift, as a share of the circle
    grey: Tensor  # 1: the image becomes grey
    sigma: Tensor  # standard deviation of the blur in pixels; 0: no blur

    @classmethod
    def of(cls, count: int, config: AugmentConfig) -> Draws:
        """Draw for `count` images with torch's CPU generator, so that a seed gives the same values on every device."""
        uniform = torch.rand(8, count, 1, 1, 1)
        jittered, blurred = uniform[0] < config.jitter, uniform[1] < config.blur

        def factor(row: int, strength: float) -> Tensor:
            low = max(0.0, 1 - strength)
            return torch.where(jittered, low + (1 + strength - low) * uniform[row], 1.0)

        low, high = BLUR_SIGMA
        return cls(
            factor(2, config.brightness),
            factor(3, config.contrast),
            factor(4, config.saturation),
            torch.where(jittered, (2 * uniform[5] - 1) * config.hue, 0.0),
            (uniform[6] < config.grey).float(),
            torch.where(blurred, low + (high - low) * uniform[7], 0.0),
        )


def augment(pixels: Tensor, config: AugmentConfig) -> Tensor:
    """Colour jitter, grey and blur: [B, 3, H, W] uint8 RGB on any device -> the same, or `pixels` itself if all are off."""
    if not (config.jitter or config.grey or config.blur):
        return pixels
    draws = to_device(Draws.of(len(pixels), config), pixels.device)
    # Autocast would blur in bfloat16, which is no finer than 8-bit pixels.
    with torch.autocast(pixels.device.type, enabled=False):
        return (apply_draws(pixels.float() / 255, draws) * 255).round().to(torch.uint8)


def apply_draws(images: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue, grey and blur, in this order: [B, 3, H, W] float32 in [0, 1] -> the same."""
    images = (images * draws.brightness).clamp(0, 1)
    images = _blend(images, rgb_to_grayscale(images).mean(dim=(2, 3), keepdim=True), draws.contrast)
    images = _blend(images, rgb_to_grayscale(images), draws.saturation)
    images = _shift_hue(images, draws.hue)
    images = torch.where(draws.grey > 0, rgb_to_grayscale(images), images)
    return torch.where(draws.sigma > 0, _blur(images, draws.sigma.clamp_min(BLUR_SIGMA[0])), images)


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (share * images + (1 - share) * other).clamp(0, 1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Through HSV and back (Foley et al. 1990, section 13.3.4)."""
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    span = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    shifted = sixth + 6 * shift
    distance = torch.cat([shifted + corner for corner in (5, 3, 1)], dim=1) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    edge = BLUR_SIDE // 2
    offsets = torch.arange(-edge, edge + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma.view(count, 1)) ** 2)
    kernels = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = F.pad(images, (edge, edge, edge, edge), mode="reflect").view(1, count * channels, height + 2 * edge, -1)
    planes = F.conv2d(planes, kernels.view(-1, 1, 1, BLUR_SIDE), groups=count * channels)
    planes = F.conv2d(planes, kernels.view(-1, 1, BLUR_SIDE, 1), groups=count * channels)
    return planes.view(count, channels, height, width)
