import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from pipeline.training.segmentation_scores import segmentation_scores


@pytest.fixture
def maps():
    """Predicted and true classes of 5 maps; class 6 occurs nowhere, 5 in the predictions alone, -1 is ignored."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 5, (5, 40, 30))
    return np.where(rng.random(labels.shape) < 0.7, np.maximum(labels, 0), rng.integers(0, 6, labels.shape)), labels


def scores_of(predicted, labels, classes=7):
    pairs = zip(*map(torch.tensor, (np.array(predicted), np.array(labels))), strict=True)
    return segmentation_scores(sum(multiclass_confusion_matrix(*pair, classes, ignore_index=-1) for pair in pairs))


def test_scores_equal_an_independent_computation(maps):
    predicted, labels = maps
    (scores, per_class, _), known = scores_of(*maps), labels >= 0
    masks = [(known & (predicted == c), known & (labels == c)) for c in range(7)]
    iou = [(p & t).sum() / (p | t).sum() if (p | t).any() else np.nan for p, t in masks]
    recall = [(p & t).sum() / t.sum() if t.any() else np.nan for p, t in masks]
    assert iou[5] == 0
    assert np.isnan(iou[6])
    assert np.allclose(per_class, 100 * np.array(iou), equal_nan=True)
    assert scores["miou"] == pytest.approx(100 * np.nanmean(iou))
    assert scores["macc"] == pytest.approx(100 * np.nanmean(recall))
    assert scores["aacc"] == pytest.approx(100 * (predicted == labels)[known].mean())


def test_scores_equal_torchmetrics(maps):
    predicted, labels = (torch.tensor(part) for part in maps)
    reference = multiclass_jaccard_index(predicted, labels, 7, average=None, ignore_index=-1)
    scores, iou, _ = scores_of(*maps)
    assert torch.allclose(iou.nan_to_num(0).float(), 100 * reference)
    assert scores["miou"] == pytest.approx(100 * reference[:6].mean().item(), rel=1e-5)


def test_a_perfect_map_scores_100_whatever_classes_it_lacks():
    labels = torch.tensor([[0, 2], [2, -1]])
    scores, _, _ = scores_of([labels.clamp_min(0).numpy()], [labels.numpy()], 4)
    assert scores == {"miou": 100, "macc": 100, "aacc": 100}
