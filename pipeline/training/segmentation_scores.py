"""Scores of a segmentation in percent (Long et al. 2015, section 5)."""

from torch import Tensor


def segmentation_scores(matrix: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """mIoU, mean and overall pixel accuracy; intersection over union, and accuracy, of every class: float64 [K].

    Both are NaN for a class that does not occur; mIoU leaves out classes that occur neither in the labels nor in the
    predictions, the mean accuracy those not in the labels.

    Args:
        matrix: pixels by true class (row) and predicted class (column), [K, K].
    """
    matrix = matrix.double()
    hit, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = 100 * hit / (true + predicted - hit), 100 * hit / true
    means = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": 100 * hit.sum() / matrix.sum()}
    return {name: float(value) for name, value in means.items()}, iou, accuracy
