"""The layers, each with its folded form."""

import pytest
import torch
from torch import nn

from pipeline.student.layers import FFN, Classifier, ConvBN, RepDW, Residual, fuse_children


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (5, 1, 4), (3, 1, 2)])
def test_conv_bn_folds_into_one_convolution(live, kernel, stride, groups):
    layer = live(ConvBN(4, 8, kernel, stride, groups))
    x = torch.randn(2, 4, 7, 6)
    fused = layer.fuse()
    assert type(fused) is nn.Conv2d
    assert not fused.training
    assert torch.allclose(fused(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8)])
@pytest.mark.parametrize(("kernel", "small"), [(3, 0), (3, 1), (5, 3), (7, 5), (7, 3)])
@pytest.mark.parametrize("identity", [False, True])
def test_rep_dw_folds_into_one_depthwise_convolution(live, kernel, small, identity, size):
    layer = live(RepDW(6, kernel, small, identity))
    x = torch.randn(2, 6, *size)
    fused = layer.fuse()
    assert fused.weight.shape == (6, 1, kernel, kernel)
    assert torch.allclose(fused(x), layer(x), atol=1e-5)


def test_folding_keeps_device_dtype_and_layout(live):
    layer = live(RepDW(6, 3, 1, identity=True)).to(torch.bfloat16)
    assert layer.fuse().weight.dtype == torch.bfloat16
    with torch.device("meta"):
        assert ConvBN(3, 4).fuse().weight.device.type == "meta"
    wide = live(ConvBN(4, 8, 3)).to(memory_format=torch.channels_last)
    assert wide.fuse().weight.is_contiguous(memory_format=torch.channels_last)


def test_folding_leaves_the_original_alone(live):
    layer = live(RepDW(6, 3, 1, identity=True)).double()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.fuse()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_folding_is_done_in_float64(live):
    layer = live(ConvBN(16, 16, 3))
    fused = layer.fuse()
    exact = live(ConvBN(16, 16, 3)).double()
    exact.load_state_dict(layer.state_dict())
    weight, bias = exact.folded()
    assert torch.equal(fused.weight, weight.float())
    assert torch.equal(fused.bias, bias.float())


def test_residual_with_layer_scale_folds(live):
    layer = live(Residual(FFN(4, 3, "gelu"), 4, drop_path=0.5, layer_scale=1e-6))
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x)
    assert torch.allclose(expected, x + layer.gamma * layer.branch(x), atol=1e-6)
    fused = layer.fuse()
    assert fused.gamma is None
    assert isinstance(fused.drop_path, nn.Identity)
    assert torch.allclose(fused(x), expected, atol=1e-5)


def test_layer_scale_starts_at_its_value_per_channel():
    gamma = Residual(nn.Identity(), 4, layer_scale=1e-6).gamma
    assert gamma.shape == (1, 4, 1, 1)
    assert torch.equal(gamma, torch.full((1, 4, 1, 1), 1e-6))


def test_ffn_places_the_depthwise_convolution():
    order = [name for name, _ in FFN(4, 2, "gelu", before=nn.Identity(), inside=nn.Identity()).named_children()]
    assert order == ["before", "expand", "inside", "act", "project"]
    assert FFN(4, 2.5, "gelu").expand.conv.out_channels == 10


@pytest.mark.parametrize("distill_head", [False, True])
def test_classifier_folds_into_one_linear(live, distill_head):
    layer = live(Classifier(6, 3, distill_head))
    x = torch.randn(5, 6)
    fused = layer.fuse()
    assert type(fused) is nn.Linear
    assert torch.allclose(fused(x), layer(x), atol=1e-6)


def test_classifier_returns_both_outputs_only_in_distilled_training():
    layer = Classifier(6, 3, distill_head=True).train()
    x = torch.randn(5, 6)
    assert layer(x).shape == (5, 3)
    layer.distilled_training = True
    main, distill = layer(x)
    assert torch.allclose((main + distill) / 2, (layer.main(x) + layer.distill(x)) / 2, atol=1e-6)
    assert isinstance(layer.eval()(x), torch.Tensor)


def test_fuse_children_reaches_nested_modules(live):
    net = live(nn.Sequential(nn.Sequential(ConvBN(3, 4)), nn.ModuleList([RepDW(4, 3, 1)])))
    assert fuse_children(net) is net
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
