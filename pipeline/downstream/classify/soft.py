"""Soft targets: labels mixed with a trained classifier's probabilities for the same augmented images.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2, at temperature 1; the classifier
sees the student's own augmentation and mixing, as in Beyer et al., "Knowledge distillation: A good teacher is patient and
consistent" (2022), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pipeline.downstream.classify.task import LabelledBatch


class SoftTargets:
    """Mixes a classifier's probabilities into the targets of a batch.

    Args:
        model: [B, 3, H, W] float32 RGB in [0, 1] -> logits [B, K]; in evaluation mode.
        share: of its probabilities in the targets, in (0, 1].
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share

    @torch.no_grad()
    def __call__(self, batch: LabelledBatch, device: torch.device) -> LabelledBatch:
        """The same images with mixed targets, both on the device."""
        images = batch.images.to(device, non_blocking=True)
        probabilities = self.model.to(device)(images).float().softmax(1)
        targets = torch.lerp(batch.targets.to(device), probabilities, self.share)
        return batch._replace(images=images, targets=targets)
