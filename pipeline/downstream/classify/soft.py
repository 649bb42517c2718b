"""Soft targets: labels mixed with a trained classifier's probabilities for the same augmented images.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2, at temperature 1; the classifier
sees the student's own augmentation and mixing, as in Beyer et al., "Knowledge distillation: A good teacher is patient and
consistent" (2022), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.downstream.backbone import check_input_size
from pipeline.downstream.base import SoftTeacher
from pipeline.downstream.saved import find_model
from pipeline.errors import UserError
from pipeline.sources.base import odd_class

if TYPE_CHECKING:
    from pipeline.downstream.classify.task import Classification, LabelledBatch


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


def find_soft_teacher(task: Classification, classes: Sequence[str], tracking_uri: str) -> SoftTeacher | None:
    """The classifier that `classify.teacher` names; None if it names none.

    Raises:
        UserError: if it is no fine-tuned classifier, has other classes, or does not take images of `student.input_size`.
    """
    name = task.settings.teacher
    if name is None:
        return None
    saved = find_model(name, tracking_uri)
    if saved is None or saved.task.name != task.name:
        raise UserError(f"classify.teacher: {name} is no fine-tuned classifier; jobs/finetune.py makes one")
    if (odd := odd_class(saved.classes, classes)) is not None:
        raise UserError(f"classify.teacher: {name} and data.train differ in their classes: {odd}")
    check_input_size(saved.model, task.image_size(), f"classify.teacher: {name}")
    return SoftTeacher(saved, name, f"{task.settings.teacher_share:.0%} from {name}")
