import numpy as np
import pytest
import torch

from pipeline.cache.reader import NO_LABEL
from pipeline.errors import UserError
from pipeline.evaluate.knn import knn_accuracy


def _reference(bank, labels, queries, expected, k, temperature):
    """The same definition, one query at a time in float64."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    correct = 0
    for query, label in zip(queries, expected, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        correct += votes.argmax() == label
    return 100 * correct / len(queries)


def test_accuracy_equals_an_independent_computation():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(7, 12))
    labels, query_labels = rng.integers(0, 7, 300), rng.integers(0, 7, 90)
    bank, queries = (centres[y] + 1.5 * rng.normal(size=(len(y), 12)) for y in (labels, query_labels))
    tensors = [torch.tensor(x) for x in (bank, labels, queries, query_labels)]
    expected = _reference(bank, labels, queries, query_labels, 20, 0.07)
    assert 30 < expected < 95
    assert knn_accuracy(*tensors) == pytest.approx(expected)


def test_more_neighbours_than_images_and_unlabelled_images():
    bank, labels = torch.eye(3), torch.tensor([0, 1, NO_LABEL])
    queries, query_labels = torch.eye(3), torch.tensor([0, 1, 0])
    assert knn_accuracy(bank, labels, queries, query_labels, k=20) == pytest.approx(100, abs=34)
    assert knn_accuracy(bank, labels, queries[:2], query_labels[:2], k=20) == 100


def test_no_labels_at_all_is_refused():
    with pytest.raises(UserError, match="kNN needs labels on both sides"):
        knn_accuracy(torch.eye(2), torch.tensor([NO_LABEL, NO_LABEL]), torch.eye(2), torch.tensor([0, 1]))
