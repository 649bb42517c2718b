"""The inference form of the whole network."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.utils import reparameterize_model
from torch import nn

from pipeline.student.layers import Classifier, ConvBN, RepDW

OPTIONS = [
    {},
    {"layer_scale": 1e-6},
    {"reparam": False},
    {"reparam": False, "layer_scale": 1e-6, "elrf_mode": "mid"},
    {"elrf_mode": "mid"},
    {"elrf_mode": "pre", "layer_scale": 0.5},
    {"stem": "fused_ib", "act": "gelu"},
    {"distill_head": True, "drop_path": 0.2},
    {"gate_act": "silu", "local_kernel": 5, "cpe_kernel": 5, "elrf_kernels": (5, 7)},
    {"gate_act": "none", "local_kernel": 0, "cpe_kernel": 0},
    {"num_classes": 0, "layer_scale": 1e-6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_stay_the_same(tiny, live, options):
    model = live(tiny(**options))
    for size in ((64, 64), (33, 50)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
            out = copy.deepcopy(model).fuse()(x)
        error = (out - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()
        assert error <= 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_folding_is_exact_in_float64(tiny, live, options):
    model, x = live(tiny(**options)).double(), torch.randn(2, 3, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert (model.fuse()(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_outputs_of_a_shipped_size_stay_the_same(live):
    model, x = live(timm.create_model("regla_t", layer_scale=1e-6)), torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        out = model.fuse().forward_intermediates(x, intermediates_only=True)
    for a, b in zip(out, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_left_to_fold(tiny, live, options):
    model = live(tiny(**options)).fuse()
    foldable = (nn.BatchNorm1d, nn.BatchNorm2d, ConvBN, RepDW, Classifier, DropPath)
    assert [m for m in model.modules() if isinstance(m, foldable)] == []
    assert model.no_weight_decay() == set()
    assert not any(m.training for m in model.modules())


def test_twice_is_once(tiny, live):
    once = live(tiny(layer_scale=0.1)).fuse()
    state = copy.deepcopy(once.state_dict())
    assert once.fuse() is once
    assert state.keys() == once.state_dict().keys()
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in state.items())


def test_training_mode_is_refused(tiny):
    with pytest.raises(RuntimeError, match="eval"):
        tiny().train().fuse()


def test_a_fused_model_keeps_its_interface(tiny, live):
    model, x = live(tiny()).fuse(), torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=(1, 3))
    assert [m.shape[1] for m in maps] == [16, 32]
    assert torch.equal(last, model.forward_features(x))
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert model.fuse()(x).shape == (1, 7)


def test_a_fused_checkpoint_loads_into_a_fused_model(tiny, live):
    model, x = live(tiny()).fuse(), torch.randn(1, 3, 64, 64)
    other = tiny().eval().fuse()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_half_precision_folds_from_its_own_weights(tiny, live):
    model, x = live(tiny()).to(torch.bfloat16), torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x).float()
        out = model.fuse()(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_synchronised_batch_norm_folds_too(tiny, live):
    model, x = live(tiny()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(model).fuse()
        assert torch.allclose(fused(x), expected, atol=1e-4)
    assert not any("BatchNorm" in type(m).__name__ for m in fused.modules())


def test_timm_reparameterize_model_folds_the_same(tiny, live):
    model, x = live(tiny(layer_scale=1e-6)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = reparameterize_model(model)
        assert torch.equal(fused(x), model.fuse()(x))
