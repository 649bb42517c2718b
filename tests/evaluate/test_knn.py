import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.cache.read.shard_reader import NO_LABEL
from pipeline.errors import UserError
from pipeline.evaluate import knn
from pipeline.evaluate.knn import knn_accuracies, knn_accuracy, merge, nearest

KS = (10, 20, 100, 200)


@pytest.fixture
def clouds():
    """Bank and queries of seven overlapping classes, as tensors."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(7, 12))
    labels, query_labels = rng.integers(0, 7, 300), rng.integers(0, 7, 90)
    bank, queries = (centres[y] + 1.5 * rng.normal(size=(len(y), 12)) for y in (labels, query_labels))
    return [torch.tensor(x) for x in (bank, labels, queries, query_labels)]


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


def test_accuracy_equals_an_independent_computation(clouds):
    expected = _reference(*(part.numpy() for part in clouds), 20, 0.07)
    assert 30 < expected < 95
    assert knn_accuracy(*clouds) == pytest.approx(expected)


def test_votes_of_a_low_temperature_do_not_overflow():
    """exp(0.95 / 0.01) is more than a float32 holds."""
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.11]]), dim=1)
    found = knn_accuracies(bank, torch.tensor([1, 0, 0]), bank[:1], torch.tensor([1]), [1, 3], 0.001)
    assert found == {1: 100.0, 3: 100.0}


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_all_k_of_one_search_equal_scikit_learn_with_the_same_weighting(clouds, temperature):
    bank, labels, queries, expected = (part.numpy() for part in clouds)
    found = knn_accuracies(*clouds, KS, temperature)
    for k in KS:
        reference = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / temperature))
        assert found[k] == pytest.approx(100 * reference.fit(bank, labels).score(queries, expected))
    assert len(set(found.values())) == (1 if temperature == 0.07 else 4)


def test_chunks_and_parts_of_a_bank_find_what_the_whole_finds(clouds, monkeypatch):
    bank, labels, queries, _ = clouds
    whole = nearest(bank, labels, queries, 50)
    parts = merge(
        [nearest(bank[rows], labels[rows], queries, 50) for rows in torch.arange(300).split([20, 0, 280])], 50
    )
    monkeypatch.setattr(knn, "BANK_CHUNK", 64)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 32)
    for found in (parts, nearest(bank, labels, queries, 50)):
        assert torch.allclose(found.similarity, whole.similarity)
        assert torch.equal(found.labels, whole.labels)


def test_more_neighbours_than_images_and_unlabelled_images():
    bank, labels = torch.eye(3), torch.tensor([0, 1, NO_LABEL])
    queries, query_labels = torch.eye(3), torch.tensor([0, 1, 0])
    assert knn_accuracy(bank, labels, queries, query_labels, k=20) == pytest.approx(100, abs=34)
    assert knn_accuracy(bank, labels, queries[:2], query_labels[:2], k=20) == 100


def test_no_labels_at_all_is_refused():
    with pytest.raises(UserError, match="kNN needs labels on both sides"):
        knn_accuracy(torch.eye(2), torch.tensor([NO_LABEL, NO_LABEL]), torch.eye(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("side", ["the bank \\(data.train\\)", "the queries \\(data.val\\)"])
def test_vectors_that_are_not_finite_are_refused_with_their_number_and_side(clouds, side, value):
    bank, labels, queries, expected = (part.clone() for part in clouds)
    vectors = bank if "bank" in side else queries
    vectors[3, 1] = vectors[7, 0] = value
    with pytest.raises(UserError, match=rf"kNN: 2 of \d+ vectors of {side} are not finite"):
        knn_accuracy(bank, labels, queries, expected)


def test_zero_vectors_are_similar_to_nothing():
    """As the cosine of a zero vector is taken everywhere else, in float64 from the definition."""
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    near = nearest(bank, torch.tensor([0, 1, 2]), torch.tensor([[6.0, 8.0]]), 3)
    assert near.labels.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(near.similarity[0], [1.0, 0.0, -0.6], atol=1e-7)
