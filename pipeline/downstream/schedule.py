"""Learning rates by step that published fine-tuning recipes use."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.scheduler import MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler

from pipeline.downstream.config import FinetuneConfig
from pipeline.training.config import TrainConfig

POLY_POWER = 0.9
"""Of DeepLab (Chen et al. 2018, section 3.1), and of Semantic FPN in mmsegmentation."""


def make_schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig, finetune: FinetuneConfig, steps: Sequence[int]
) -> Scheduler | None:
    """Linear warm-up, then poly or multistep, from the steps of each epoch; None for the engine's own cosine."""
    if finetune.schedule == "cosine":
        return None
    warmup: dict[str, Any] = {
        "warmup_t": min(round(train.warmup_epochs * steps[0]), sum(steps) - 1),
        "warmup_lr_init": train.min_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if finetune.schedule == "poly":
        return PolyLRScheduler(optimizer, t_initial=sum(steps), power=POLY_POWER, lr_min=train.min_lr, **warmup)
    # timm applies milestone m at step m - 1.
    milestones = [sum(steps[:epoch]) + 1 for epoch in sorted(finetune.milestones)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, **warmup)
