"""Losses and their gradients against an independent computation in NumPy, float64."""

import numpy as np
import pytest
import torch

from pipeline.distill.loss import patch_loss, standardise, summary_loss


def _cosine_and_gradient(p, t):
    """Cosine over the last axis, and its gradient with respect to p."""
    pn, tn = np.linalg.norm(p, axis=-1, keepdims=True), np.linalg.norm(t, axis=-1, keepdims=True)
    cosine = (p * t).sum(-1, keepdims=True) / (pn * tn)
    return cosine[..., 0], t / (pn * tn) - cosine * p / pn**2


def _smooth_l1_and_gradient(p, t):
    difference = p - t
    small = np.abs(difference) < 1
    value = np.where(small, 0.5 * difference**2, np.abs(difference) - 0.5)
    return value, np.where(small, difference, np.sign(difference))


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 2, 4, 6)) * 1.5, rng.normal(size=(3, 2, 4, 6))


def test_patch_loss_and_gradient(pair):
    p, t = pair
    predicted = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    loss = patch_loss(predicted, torch.tensor(t, dtype=torch.float32))
    loss.sum().backward()
    cosine, cosine_gradient = _cosine_and_gradient(p, t)
    smooth, smooth_gradient = _smooth_l1_and_gradient(p, t)
    expected = (0.9 * (1 - cosine) + 0.1 * smooth.mean(-1)).mean((1, 2))
    gradient = (-0.9 * cosine_gradient + 0.1 * smooth_gradient / 6) / 8
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(predicted.grad.numpy(), gradient, atol=1e-6)


def test_summary_loss_and_gradient(pair):
    p, t = (x[:, 0, 0] for x in pair)
    predicted = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    loss = summary_loss(predicted, torch.tensor(t, dtype=torch.float32))
    loss.sum().backward()
    cosine, gradient = _cosine_and_gradient(p, t)
    np.testing.assert_allclose(loss.detach().numpy(), 1 - cosine, rtol=1e-5)
    np.testing.assert_allclose(predicted.grad.numpy(), -gradient, atol=1e-6)


def test_losses_are_float32_under_autocast(pair):
    p, t = (torch.tensor(x, dtype=torch.bfloat16) for x in pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_loss(p, t).dtype == torch.float32
        assert summary_loss(p[:, 0, 0], t[:, 0, 0]).dtype == torch.float32


def test_a_perfect_prediction_costs_nothing(pair):
    target = torch.tensor(pair[1])
    torch.testing.assert_close(patch_loss(target, target), torch.zeros(3), atol=1e-6, rtol=0)


def test_standardise_gives_zero_mean_and_unit_variance_and_silences_dead_channels():
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1, 0.0]) + 5
    out = standardise(features, features.mean(0), features.std(0))
    torch.testing.assert_close(out[:, :3].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:, :3].std(0), torch.ones(3), atol=1e-4, rtol=0)
    assert torch.equal(out[:, 3], torch.zeros(500))
