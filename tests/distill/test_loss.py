"""Losses and their gradients against an independent computation in NumPy, float64."""

import numpy as np
import pytest
import torch

from pipeline.distill.config import LossConfig
from pipeline.distill.loss import LOSSES, Loss, check_losses, compares, find_loss, image_loss, patch_relation, relation
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


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _patch_relation_and_gradient(p, t, temperature):
    """Mean divergence of an image's similarity rows [B, N, N], and its gradient by the chain rule over both factors."""
    unit, count = _unit(p), p.shape[1]
    student, teacher = (_log_softmax(x @ x.swapaxes(1, 2) / temperature) for x in (unit, _unit(t)))
    value = (np.exp(teacher) * (teacher - student)).sum((1, 2)) / count
    on_cosines = (np.exp(student) - np.exp(teacher)) / (count * temperature)
    on_unit = (on_cosines + on_cosines.swapaxes(1, 2)) @ unit
    norm = np.linalg.norm(p, axis=-1, keepdims=True)
    return value, (on_unit - unit * (on_unit * unit).sum(-1, keepdims=True)) / norm


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
    assert {name for name, loss in LOSSES.items() if loss.compares == "vectors"} == EXPECTED.keys()
    assert LOSSES.keys() - EXPECTED.keys() == {"patch_relation", "relation"}


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


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_patch_relation_is_the_divergence_between_the_similarities_of_an_images_patches(pair, temperature):
    p, t = (x.reshape(3, 8, 6) for x in pair)
    values, gradient = _run(patch_relation, p, t, temperature)
    expected, expected_gradient = _patch_relation_and_gradient(p, t, temperature)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)
    alone, _ = _run(patch_relation, p[:1], t[:1], temperature)
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-4)  # no image is compared with another


def test_patch_relation_sees_neither_scale_nor_rotation(pair):
    p, t = (x.reshape(3, 8, 6) for x in pair)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    plain, turned = _run(patch_relation, p, t, 0.2)[0], _run(patch_relation, 3 * p @ rotation, t, 0.2)[0]
    np.testing.assert_allclose(turned, plain, rtol=1e-4)


def test_patch_relation_of_a_patch_without_direction_is_finite(pair):
    p, t = (x.reshape(3, 8, 6).copy() for x in pair)
    p[0, 0], t[1, 2] = 0, 0
    values, gradient = _run(patch_relation, p, t, 0.07)
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()


def test_losses_of_patches_are_weighted_on_a_grid_as_on_a_list_of_positions(pair):
    weights = {"cosine": 0.9, "smooth_l1": 0.1, "patch_relation": 0.5}
    values, gradient = _run(lambda p, t: image_loss(weights, p, t, 0.2), *pair)
    (cosine, _), (smooth, _) = (EXPECTED[name](*pair) for name in ("cosine", "smooth_l1"))
    related, _ = _patch_relation_and_gradient(*(x.reshape(3, 8, 6) for x in pair), 0.2)
    np.testing.assert_allclose(values, (0.9 * cosine + 0.1 * smooth).mean((1, 2)) + 0.5 * related, rtol=1e-4)
    listed, listed_gradient = _run(lambda p, t: image_loss(weights, p, t, 0.2), *(x.reshape(3, 8, 6) for x in pair))
    np.testing.assert_allclose(listed, values, rtol=1e-6)
    np.testing.assert_allclose(listed_gradient, gradient.reshape(3, 8, 6), atol=1e-7)
    only, _ = _run(lambda p, t: image_loss({"patch_relation": 2.0}, p, t, 0.2), *pair)
    np.testing.assert_allclose(only, 2 * related, rtol=1e-4)


def test_losses_are_weighted_and_averaged_over_the_patches_of_an_image(pair):
    weights = {"cosine": 0.9, "smooth_l1": 0.1, "relation": 5.0}
    values, gradient = _run(lambda p, t: image_loss(weights, p, t, 0.07), *pair)
    (cosine, cosine_gradient), (smooth, smooth_gradient) = (EXPECTED[name](*pair) for name in ("cosine", "smooth_l1"))
    np.testing.assert_allclose(values, (0.9 * cosine + 0.1 * smooth).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(gradient, (0.9 * cosine_gradient + 0.1 * smooth_gradient) / 8, atol=1e-6)


def test_of_a_summary_the_loss_is_that_of_its_vector(pair):
    p, t = (x[:, 0, 0] for x in pair)
    values, gradient = _run(lambda p, t: image_loss({"cosine": 1}, p, t, 0.07), p, t)
    expected, expected_gradient = _cosine_and_gradient(p, t)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def _relation_and_gradient(p, t, past, temperature):
    student, teacher = (_log_softmax(_unit(x) @ past.T / temperature) for x in (p, t))
    value = (np.exp(teacher) * (teacher - student)).sum(-1)
    on_unit = (np.exp(student) - np.exp(teacher)) @ past / temperature
    norm = np.linalg.norm(p, axis=-1, keepdims=True)
    return value, (on_unit - _unit(p) * (on_unit * _unit(p)).sum(-1, keepdims=True)) / norm


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
    rest = {"vectors": (), "patches": (0.07,), "queue": (past, torch.ones(3, dtype=torch.bool), 0.07)}
    given = {"vectors": (p, t), "patches": (p[None], t[None]), "queue": (p, t)}

    def values():
        return [loss(*given[loss.compares], *rest[loss.compares]) for loss in LOSSES.values()]

    plain = values()
    with torch.autocast("cpu", torch.bfloat16):
        cast = values()
        assert LOSSES["mse"](p.bfloat16(), t.bfloat16()).dtype == torch.float32
        assert image_loss({"cosine": 1.0}, p.bfloat16(), t.bfloat16(), 0.07).dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_perfect_prediction_costs_nothing(pair):
    target = torch.tensor(pair[1])
    found = image_loss(dict.fromkeys(LOSSES, 1.0), target, target, 0.07)
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-6, rtol=0)


PLUGIN = """
from pipeline.distill.loss import compares

@compares("patches")
def spread(predicted, target, temperature):
    return (predicted.std(dim=1) - target.std(dim=1)).square().mean(dim=1) / temperature

def plain(predicted, target):
    return predicted
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_losses_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_losses_of_a_test"


def test_a_loss_of_the_users_own_is_named_by_its_module(plugin, pair):
    name = f"{plugin}:spread"
    config = LossConfig(patches={"cosine": 1, name: 0.5})
    check_losses(config)
    values, _ = _run(lambda p, t: image_loss(config.patches, p, t, 0.5), *pair)
    p, t = (x.reshape(3, 8, 6) for x in pair)
    expected = _cosine_and_gradient(p, t)[0].mean(1) + ((p.std(1, ddof=1) - t.std(1, ddof=1)) ** 2).mean(1)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"loss\.summary: my_losses_of_a_test:spread compares the patches of an image"):
        check_losses(LossConfig(summary={name: 1}))
    with pytest.raises(UserError, match=r"loss\.patches: my_losses_of_a_test:plain is not decorated with .*compares$"):
        check_losses(LossConfig(patches={f"{plugin}:plain": 1}))
    assert isinstance(find_loss(name), Loss)


def test_a_declared_loss_is_its_function_in_float32():
    assert compares("vectors")(lambda p, t: p - t)(torch.ones(2).bfloat16(), torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patches": {"cosin": 1}}, r"loss\.patches: there is no loss cosin; did you mean cosine\? known are cosine, "),
        (
            {"patches": {"relation": 1}},
            r"loss\.patches: relation compares a summary with past ones; known are cosine, smooth_l1, mse, patch_relation$",
        ),
        (
            {"summary": {"patch_relation": 1}},
            r"loss\.summary: patch_relation compares the patches .*; known are cosine, smooth_l1, mse, relation$",
        ),
        (
            {"summary": {"qqq": 1}},
            r"loss\.summary: there is no loss qqq; known are .*relation, and package.module:function$",
        ),
        ({"patches": {"nowhere:f": 1}}, r"loss\.patches: nowhere:f cannot be imported .*PYTHONPATH"),
        ({"patches": {"math:nothing": 1}}, r"loss\.patches: module math has no nothing$"),
    ],
)
def test_a_loss_that_is_not_registered_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        check_losses(LossConfig(**fields))


def test_registered_losses_are_taken():
    fitting = {"patches": ("vectors", "patches"), "summary": ("vectors", "queue")}
    fields = {
        field: {name: 1 for name, loss in LOSSES.items() if loss.compares in kinds} for field, kinds in fitting.items()
    }
    check_losses(LossConfig(**fields))
