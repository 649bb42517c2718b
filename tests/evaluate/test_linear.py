import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from pipeline.evaluate.linear import LinearHeads, accuracies, shuffled, train_heads

LRS = [0.01, 0.1, 1.0]


@pytest.fixture(scope="module")
def problem():
    """Training and held-out features of six overlapping classes, of very unlike scales."""
    rng = np.random.default_rng(0)
    centres, scales = rng.normal(size=(6, 16)), 10 ** rng.uniform(-2, 2, 16)
    labels, held_out = rng.integers(0, 6, 600), rng.integers(0, 6, 400)
    features, queries = (scales * (centres[y] + rng.normal(size=(len(y), 16)) + 3) for y in (labels, held_out))
    return [torch.tensor(x, dtype=torch.float32 if x.ndim > 1 else None) for x in (features, labels, queries, held_out)]


def make_heads(features, classes=6):
    return LinearHeads(features.mean(dim=0), features.std(dim=0), classes, LRS)


def train(heads, problem, folder, epochs=3, stop_after=None):
    features, labels = problem[:2]
    losses = []

    def note(epoch, means):
        losses.append(means)
        if epoch == stop_after:
            raise KeyboardInterrupt

    train_heads(heads, shuffled(features, labels, 64, 0), 10, epochs, folder / "state.pt", note)
    return losses


def test_classifiers_side_by_side_are_those_trained_one_by_one(problem, tmp_path):
    features, labels = problem[:2]
    heads = make_heads(features)
    start = {name: value.clone() for name, value in heads.linear.state_dict().items()}
    train(heads, problem, tmp_path)
    x = (features - heads.mean) / heads.std
    for number, lr in enumerate(LRS):
        rows = slice(6 * number, 6 * number + 6)
        alone = nn.Linear(16, 6)
        alone.load_state_dict({name: value[rows] for name, value in start.items()})
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for epoch in range(3):
            for batch, expected in shuffled(x, labels, 64, 0)(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(alone(batch), expected).backward()
                optimizer.step()
                schedule.step()
        assert torch.allclose(heads.linear.weight[rows], alone.weight, rtol=1e-3, atol=1e-4)
        assert torch.allclose(heads.linear.bias[rows], alone.bias, rtol=1e-3, atol=1e-4)


def test_the_best_classifier_is_within_a_point_of_logistic_regression(problem, tmp_path):
    features, labels, queries, expected = problem
    heads = make_heads(features)
    losses = train(heads, problem, tmp_path, epochs=20)
    assert min(losses[-1]) < min(losses[0])
    x, y = (((part - heads.mean) / heads.std).numpy() for part in (features, queries))
    reference = 100 * LogisticRegression(max_iter=500).fit(x, labels).score(y, expected)
    assert 70 < reference < 99
    assert max(accuracies(heads, queries, expected)["top1"]) > reference - 1


def test_a_diverged_classifier_does_not_touch_the_others(problem, tmp_path):
    features, queries = problem[0], problem[2]
    alone, beside = make_heads(features), make_heads(features)
    beside.lrs[2] = 1e38
    train(alone, problem, tmp_path / "alone")
    train(beside, problem, tmp_path / "beside")
    assert not torch.isfinite(beside(queries)[:, 2]).all()
    assert torch.equal(beside(queries)[:, :2], alone(queries)[:, :2])


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(problem, tmp_path):
    whole, cut, rest = (make_heads(problem[0]) for _ in range(3))
    train(whole, problem, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(cut, problem, tmp_path / "cut", stop_after=2)
    assert len(train(rest, problem, tmp_path / "cut")) == 1
    assert torch.equal(whole.linear.weight, rest.linear.weight)
    assert train(rest, problem, tmp_path / "cut") == []


def test_accuracies_count_the_first_and_the_first_five(problem):
    features, _, queries, expected = problem
    heads = make_heads(features)
    with torch.no_grad():
        order = heads(queries).argsort(dim=2, descending=True).numpy()
    found = accuracies(heads, queries, expected)
    for number in range(3):
        hits = order[:, number] == expected.numpy()[:, None]
        assert found["top1"][number] == pytest.approx(100 * hits[:, 0].mean())
        assert found["top5"][number] == pytest.approx(100 * hits[:, :5].any(axis=1).mean())
    three = accuracies(make_heads(features, classes=3), queries, expected % 3)
    assert three["top5"] == [100, 100, 100]


def test_a_batch_without_samples_has_no_loss(problem):
    heads = make_heads(problem[0])
    assert heads.losses(torch.empty(0, 16), torch.empty(0, dtype=torch.int64)).tolist() == [0, 0, 0]
