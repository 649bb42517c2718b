"""Losses that benchmarks/proof.py compares with those of `pipeline/distill/loss.py`, and that no recipe uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distill.loss import compares

DISPERSION = (math.pi / 2) ** 2
"""Mean squared angle between targets and their mean direction. Standardised targets have mean 0 in each channel, so that
no direction is preferred and nearly all of their angles are right ones, whatever the teacher."""


@compares("vectors")
def angle(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared angle between predicted and target over the teacher's dispersion, as for C-RADIOv4's summaries: [..., D] -> [...].

    The angle is 2 atan2(|p - t|, |p + t|) of unit vectors (Kahan), whose gradient is finite where they agree, as that of the arc
    cosine is not.
    """
    p, t = (F.normalize(vectors, dim=-1) for vectors in (predicted, target))
    apart, together = ((p - t).square().sum(-1), (p + t).square().sum(-1))
    angles = 2 * torch.atan2(apart.clamp_min(1e-12).sqrt(), together.clamp_min(1e-12).sqrt())
    return angles.square() / DISPERSION
