"""Losses and their gradients against an independent computation in NumPy, float64."""

import numpy as np
import pytest
import torch

from pipeline.distill.config import LossConfig
from pipeline.distill.loss import LOSSES, RELATIONS, check_losses, relation, vector_loss
from pipeline.errors import UserError


def _cosine_and_gradient(p, t):
    """1 - cosine over the last axis, and its gradient with respect to p."""
    pn, tn = np.linalg.norm(p, axis=-1, keepdims=True), np.linalg.norm(t, axis=-1, keepdims=True)
    cosine = (p * t).sum(-1, keepdims=True) / (pn * tn)
    return 1 - cosine[..., 0], cosine * p / pn**2 - t / (pn * tn)


def _smooth_l1_and_gradient(p, t):
    difference = p - t
    small = np.abs(difference) < 1
    value = np.where(small, 0.5 * difference**2, np.abs(difference) - 0.5)
    return value.mean(-1), np.where(small, difference, np.sign(difference)) / p.shape[-1]


def _mse_and_gradient(p, t):
    return ((p - t) ** 2).mean(-1), 2 * (p - t) / p.shape[-1]


EXPECTED = {"cosine": _cosine_and_gradient, "smooth_l1": _smooth_l1_and_gradient, "mse": _mse_and_gradient}


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 2, 4, 6)) * 1.5, rng.normal(size=(3, 2, 4, 6))


def _run(loss, p, t, *rest):
    predicted = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    values = loss(predicted, torch.tensor(t, dtype=torch.float32), *rest)
    values.sum().backward()
    return values.detach().numpy(), predicted.grad.numpy()


def test_every_registered_loss_is_checked_here():
    assert LOSSES.keys() == EXPECTED.keys()
    assert RELATIONS.keys() == {"relation"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_loss_and_its_gradient(name, pair):
    values, gradient = _run(LOSSES[name], *pair)
    expected, expected_gradient = EXPECTED[name](*pair)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_a_vector_without_direction_is_at_a_right_angle_to_all(pair):
    p, t = (x.copy() for x in pair)
    p[0], t[1] = 0, 0
    values, gradient = _run(LOSSES["cosine"], p, t)
    _, expected_gradient = _cosine_and_gradient(p[2:], t[2:])
    assert (values[:2] == 1).all()
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()
    np.testing.assert_allclose(gradient[2:], expected_gradient, atol=1e-6)


def test_terms_are_weighted_and_averaged_over_the_tokens_of_an_image(pair):
    terms = {"cosine": 0.9, "smooth_l1": 0.1, "relation": 5.0}
    values, gradient = _run(lambda p, t: vector_loss(terms, p, t), *pair)
    (cosine, cosine_gradient), (smooth, smooth_gradient) = (EXPECTED[name](*pair) for name in ("cosine", "smooth_l1"))
    np.testing.assert_allclose(values, (0.9 * cosine + 0.1 * smooth).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(gradient, (0.9 * cosine_gradient + 0.1 * smooth_gradient) / 8, atol=1e-6)


def test_of_a_summary_the_loss_is_that_of_its_vector(pair):
    p, t = (x[:, 0, 0] for x in pair)
    values, gradient = _run(lambda p, t: vector_loss({"cosine": 1}, p, t), p, t)
    expected, expected_gradient = _cosine_and_gradient(p, t)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def _relation_and_gradient(p, t, past, temperature):
    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    student, teacher = (log_softmax(unit(x) @ past.T / temperature) for x in (p, t))
    value = (np.exp(teacher) * (teacher - student)).sum(-1)
    on_unit = (np.exp(student) - np.exp(teacher)) @ past / temperature
    norm = np.linalg.norm(p, axis=-1, keepdims=True)
    return value, (on_unit - unit(p) * (on_unit * unit(p)).sum(-1, keepdims=True)) / norm


def test_relation_is_the_divergence_over_the_places_that_are_filled():
    rng = np.random.default_rng(1)
    p, t, past = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(5, 6))
    past /= np.linalg.norm(past, axis=-1, keepdims=True)
    expected, expected_gradient = _relation_and_gradient(p, t, past, 0.2)
    padded = torch.tensor(np.concatenate([past, np.zeros((3, 6))]), dtype=torch.float32)
    values, gradient = _run(relation, p, t, padded, torch.arange(8) < 5, 0.2)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_relation_leaves_out_the_places_of_the_image_itself():
    rng = np.random.default_rng(2)
    p, t, past = rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), rng.normal(size=(5, 6))
    past[1], past[4] = 2 * t[0], t[2] + 1e-4 * rng.normal(size=6)
    past /= np.linalg.norm(past, axis=-1, keepdims=True)
    values, gradient = _run(relation, p, t, torch.tensor(past), torch.ones(5, dtype=torch.bool), 0.2)
    for row, kept in enumerate(([0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3])):
        expected, expected_gradient = _relation_and_gradient(p[row], t[row], past[kept], 0.2)
        np.testing.assert_allclose(values[row], expected, rtol=1e-4)
        np.testing.assert_allclose(gradient[row], expected_gradient, atol=1e-5)
    (alone,), gradient = _run(relation, p[:1], t[:1], torch.tensor(past[1:2]), torch.ones(1, dtype=torch.bool), 0.07)
    assert alone == 0
    assert not gradient.any()


def test_relation_to_an_empty_queue_and_of_a_perfect_prediction_is_nothing(pair):
    p, t = (x[:, 0, 0] for x in pair)
    empty, gradient = _run(relation, p, t, torch.zeros(5, 6), torch.zeros(5, dtype=torch.bool), 0.07)
    assert not empty.any()
    assert not gradient.any()
    past = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    perfect, _ = _run(relation, 3 * t, t, past, torch.ones(5, dtype=torch.bool), 0.07)
    np.testing.assert_allclose(perfect, 0, atol=1e-5)


def test_losses_are_float32_under_autocast_and_as_exact(pair):
    p, t = (torch.tensor(x[:, 0, 0], dtype=torch.float32) for x in pair)
    past = torch.nn.functional.normalize(t, dim=-1)
    known = torch.ones(3, dtype=torch.bool)
    plain = [*(loss(p, t) for loss in LOSSES.values()), relation(p, t, past, known, 0.07)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [*(loss(p, t) for loss in LOSSES.values()), relation(p, t, past, known, 0.07)]
        assert LOSSES["mse"](p.bfloat16(), t.bfloat16()).dtype == torch.float32
        assert vector_loss({"cosine": 1.0}, p.bfloat16(), t.bfloat16()).dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_perfect_prediction_costs_nothing(pair):
    target = torch.tensor(pair[1])
    terms = dict.fromkeys(LOSSES, 1.0)
    torch.testing.assert_close(vector_loss(terms, target, target), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patches": {"cosin": 1}}, r"loss\.patches: there is no loss cosin; did you mean cosine\? known are cosine, "),
        ({"patches": {"relation": 1}}, r"loss\.patches: there is no loss relation; known are cosine, smooth_l1, mse$"),
        ({"summary": {"qqq": 1}}, r"loss\.summary: there is no loss qqq; known are .*relation$"),
    ],
)
def test_a_loss_that_is_not_registered_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        check_losses(LossConfig(**fields))


def test_registered_losses_are_taken():
    check_losses(LossConfig(patches=dict.fromkeys(LOSSES, 1), summary=dict.fromkeys((*LOSSES, *RELATIONS), 1)))
