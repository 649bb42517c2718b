import numpy as np
import pytest
import torch

from pipeline.cache.config import TeacherConfig
from pipeline.distill.balance import drop_coefficients, is_scheduled, teacher_weights, weight_at
from pipeline.distill.distiller import SummaryQueue


@pytest.mark.parametrize(
    ("schedule", "progress", "weight"),
    [
        (0.5, 0.7, 0.5),
        ({0: 1, 0.5: 0.2}, 0, 1),
        ({0: 1, 0.5: 0.2}, 0.25, 0.6),
        ({0.5: 0.2, 0: 1}, 0.8, 0.2),
        ({0.2: 3}, 0.1, 3),
    ],
)
def test_a_weight_is_constant_or_linear_between_the_points_given(schedule, progress, weight):
    assert weight_at(schedule, progress) == pytest.approx(weight)


class _Cached:
    """What the weights need of a cached teacher."""

    def __init__(self, *kinds, **weights):
        self.config, self.shapes = TeacherConfig(model="x", **weights), dict.fromkeys(kinds)


def test_weights_of_token_types_are_parts_of_the_teachers():
    teachers = [
        _Cached("summary", "patches", weight={0: 2, 1: 0}, summary_weight=0.5, patch_weight={0: 1, 1: 3}),
        _Cached("patches", weight=0.25, mask_weight=2),
    ]
    torch.testing.assert_close(teacher_weights(teachers), torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.25, 0.5]]))
    torch.testing.assert_close(teacher_weights(teachers, 0.5), torch.tensor([[0.5, 2.0, 0.0], [0.0, 0.25, 0.5]]))
    assert is_scheduled(teachers)
    assert not is_scheduled(teachers[1:])


def test_dropping_keeps_the_worst_teacher_and_weighs_every_image_alike():
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 0.5, 2.0])
    losses = rng.uniform(0.1, 1, (200, 3)) * weights
    draws = rng.uniform(size=(200, 3))
    factors = drop_coefficients(*(torch.tensor(x) for x in (losses, weights, draws)), 0.5).numpy()
    expected = np.zeros((200, 3))
    for image in range(200):
        kept = [t for t in range(3) if draws[image, t] >= 0.5 or t == losses[image].argmax()]
        for teacher in kept:
            expected[image, teacher] = weights.sum() / weights[kept].sum()
    np.testing.assert_allclose(factors, expected)
    np.testing.assert_allclose(factors @ weights, weights.sum())
    assert {tuple(row > 0) for row in factors} >= {(True, True, True), (False, False, True), (True, False, False)}


def test_without_dropping_every_factor_is_one():
    losses, draws = torch.rand(5, 3), torch.rand(5, 3)
    assert torch.equal(drop_coefficients(losses, torch.tensor([1.0, 0.0, 2.0]), draws, 0.0), torch.ones(5, 3))
    assert not drop_coefficients(0 * losses, torch.zeros(3), draws, 0.5).any()


def test_the_queue_holds_the_latest_summaries_as_unit_vectors():
    queue = SummaryQueue(5, 3)
    rows = torch.randn(7, 3)
    assert not queue.entries()[1].any()
    queue.push(rows[:3])
    assert queue.entries()[1].tolist() == [True, True, True, False, False]
    queue.push(rows[3:7])
    stored, filled = queue.entries()
    assert filled.all()
    expected = torch.nn.functional.normalize(rows[2:], dim=-1)
    torch.testing.assert_close(stored[[2, 3, 4, 0, 1]], expected)
    queue.push(torch.randn(12, 3))
    assert int(queue.count) == 12
