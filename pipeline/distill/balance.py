"""Weights of the teachers: schedules, and teacher dropping."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher

LOSS_KINDS = ("summary", "patches", "masks")
"""What losses of a teacher compare, in the order of the columns of :func:`teacher_weights`."""


def weight_at(schedule: float | Mapping[float, float], progress: float) -> float:
    """A weight, constant or piecewise linear in progress: {0: 1, 0.5: 0.2} falls to 0.2 in the first half and stays there."""
    if not isinstance(schedule, Mapping):
        return float(schedule)
    points = sorted(schedule.items())
    return float(np.interp(progress, [at for at, _ in points], [weight for _, weight in points]))


def is_scheduled(teachers: Sequence[CachedTeacher]) -> bool:
    """Whether any weight changes during training."""
    configs = [teacher.config for teacher in teachers]
    return any(
        isinstance(w, Mapping) for c in configs for w in (c.weight, c.summary_weight, c.patch_weight, c.mask_weight)
    )


def teacher_weights(teachers: Sequence[CachedTeacher], progress: float = 0.0) -> Tensor:
    """Weights [T, 3] float32 of every teacher's summary, patch and mask losses; 0 if the teacher has no summary."""
    rows = []
    for teacher in teachers:
        config = teacher.config
        schedules = config.weight, config.summary_weight, config.patch_weight, config.mask_weight
        whole, *parts = (weight_at(schedule, progress) for schedule in schedules)
        kinds = zip(LOSS_KINDS, parts, strict=True)
        rows.append([whole * part if kind == "masks" or kind in teacher.shapes else 0.0 for kind, part in kinds])
    return torch.tensor(rows)


@torch.no_grad()
def drop_coefficients(
    losses: Tensor, weights: Tensor, draws: Tensor, probability: float, asked: Tensor | None = None
) -> Tensor:
    """Teacher dropping as in UNIC (Sariyildiz et al. 2024, section 3.3), normalised per image.

    Each image keeps the teacher with the largest loss and drops every other one with `probability`. In UNIC, an image that
    keeps four teachers weighs four times as much as one that keeps one. Here the weights of the kept teachers are scaled to
    the sum of all, so that all images weigh the same.

    Args:
        losses: [B, T], weighted by `weights` [T].
        draws: [B, T] uniform in [0, 1).
        asked: [B, T] factors of the losses, 0 where a teacher has no features of an image: such a teacher is neither kept nor
            dropped, and the image's weight is that of the others; None: all 1.

    Returns:
        [B, T] float32 coefficients of the losses, without these factors.
    """
    kept, hardest = draws >= probability, losses
    if asked is not None:
        weights, hardest = weights * asked, losses.masked_fill(asked == 0, float("-inf"))
    kept.scatter_(1, hardest.argmax(dim=1, keepdim=True), True)
    kept = kept if asked is None else kept & (asked > 0)
    left = (kept * weights).sum(dim=1, keepdim=True)
    # If all weights are 0, there is no loss to distribute.
    total = weights.sum(dim=-1, keepdim=True)
    return kept * torch.where(left > 0, total / left.clamp_min(torch.finfo(left.dtype).tiny), 0.0)
