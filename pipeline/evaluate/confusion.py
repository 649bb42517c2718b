"""Confusion matrix and scores of a segmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels by true class (row) and predicted class (column): [K, K] int64.

    Args:
        predicted, labels: int64 of the same shape; pixels with a negative label are ignored.
        classes: K.
    """
    known = labels >= 0
    return torch.bincount(labels[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Scores in percent (Long et al. 2015, section 5).

    Attributes:
        miou: mean intersection over union of the classes that occur in the labels or the predictions.
        macc: mean recall of the classes that occur in the labels.
        aacc: share of correct pixels.
        iou: of every class [K]; NaN for a class in neither.
    """

    miou: float
    macc: float
    aacc: float
    iou: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> SegmentationScores:
        """The scores of a confusion matrix [K, K]."""
        matrix = matrix.double()
        hits, truth, found = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        iou = 100 * hits / (truth + found - hits)
        recall = 100 * hits / truth
        return cls(iou.nanmean().item(), recall.nanmean().item(), (100 * hits.sum() / matrix.sum()).item(), iou.float())
