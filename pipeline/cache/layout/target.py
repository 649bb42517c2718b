"""The standardised target: what a student is trained on, and how much of it a codec keeps.

Training subtracts every channel's mean and divides by its deviation (`pipeline/distill/standardise.py`). Channels of small
deviation count as much there as all others, while the cosine of raw features hardly sees them: features with a common offset
have a raw cosine near 1 even if everything else is lost.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

TARGET_COSINE = 0.99
"""Mean cosine between standardised vectors and their decoded values that a codec is chosen for."""
TARGET_COSINE_P1 = 0.95
"""1st percentile of that cosine that a codec is chosen for."""
CONSTANT = 1e-6
"""A channel is constant if its deviation is at most this share of its mean, or of the median deviation: such values are
rounding errors."""


def inverse_deviations(mean: Tensor, std: Tensor) -> Tensor:
    """1 / std by channel, of float32 or float64 [D]; 0 for a constant channel."""
    alive = std[std > 0]
    typical = alive.median() if len(alive) else std.new_zeros(())
    # The median: the deviation of a massive channel may be a million times that of all others.
    varies = (std > CONSTANT * torch.maximum(mean.abs(), typical)) & torch.isfinite(1 / std)
    return torch.where(varies, 1 / std, 0.0)


def fidelity(features: Tensor, kept: Tensor, mean: Tensor, std: Tensor) -> dict[str, float]:
    """How much of features [..., D] their decoded values `kept` [..., D] retain, given statistics [D] by channel.

    Returns:
        ``target_cosine``, the mean cosine of the standardised vectors, and ``target_cosine_p1``, its 1st percentile; both are
        left out if all vectors equal the mean, which has no direction. ``relative_error``, the norm of the difference
        relative to that of the features, as they are.
    """
    features, kept = features.float().flatten(0, -2), kept.flatten(0, -2)
    tiny = torch.finfo(torch.float32).tiny
    error = ((kept - features).double().norm() / features.double().norm().clamp_min(tiny)).item()
    return {**cosine_figures(target_cosines(features, kept, mean, std)), "relative_error": error}


def target_cosines(features: Tensor, kept: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Cosine [N] of every standardised vector of [N, D] and its decoded value, without those that have no direction."""
    factors = inverse_deviations(mean, std)
    target, kept = (((part.float() - mean) * factors).float() for part in (features, kept))
    directed = target.norm(dim=-1) > 0
    return nn.functional.cosine_similarity(target[directed], kept[directed], dim=-1)


def cosine_figures(cosines: Tensor) -> dict[str, float]:
    """Mean and 1st percentile of cosines [N]; nothing if there are none."""
    if not len(cosines):
        return {}
    values = cosines.double().cpu().numpy()
    return {"target_cosine": float(values.mean()), "target_cosine_p1": float(np.percentile(values, 1))}


def keeps_target(figures: dict[str, float], margin: float = 0.0, margin_p1: float = 0.0) -> bool:
    """Whether the figures of :func:`fidelity` reach both bounds; what has no direction loses none."""
    return (
        figures.get("target_cosine", 1.0) >= TARGET_COSINE + margin
        and figures.get("target_cosine_p1", 1.0) >= TARGET_COSINE_P1 + margin_p1
    )
