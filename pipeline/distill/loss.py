"""Distillation losses: pure functions of tensors, in float32 whatever the autocast.

Per teacher: ``1 - cos`` on the summary; on every patch token ``0.9 (1 - cos) + 0.1 smooth L1``, as in AM-RADIO
(Ranzinger et al. 2024, section 3.3), with the cosine per token and targets standardised by frozen statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COSINE_SHARE = 0.9
"""Weight of the cosine term on patch tokens; the rest is smooth L1."""


def standardise(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(features - mean) / std per channel; [..., D] with mean and std [D].

    A channel that never varied (std 0) says nothing: it becomes 0 instead of dividing by 0.
    """
    alive = std > 1e-6 * std.max()
    return torch.where(alive, (features - mean) / std.clamp_min(torch.finfo(std.dtype).tiny), 0.0)


def summary_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each image.

    Args:
        predicted, target: [B, D].

    Returns:
        [B] float32.
    """
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)


def patch_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """0.9 (1 - cosine) + 0.1 smooth L1 (beta 1, mean over channels) of each token, averaged over an image's tokens.

    Args:
        predicted, target: [B, h, w, D].

    Returns:
        [B] float32.
    """
    predicted, target = predicted.float(), target.float()
    cosine = 1 - F.cosine_similarity(predicted, target, dim=-1)
    smooth = F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)
    return (COSINE_SHARE * cosine + (1 - COSINE_SHARE) * smooth).mean(dim=(1, 2))
