"""Counted costs against numbers worked out by hand."""

import pytest
import torch
from timm.layers import Attention
from torch import nn

from pipeline.student.cost import cost, inference_cost


def test_a_convolution_and_a_linear_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    counted = cost(model.eval(), torch.randn(2, 3, 10, 12))
    assert counted.parameters == 3 * 8 * 9 + 8 + 8 * 5 + 5
    assert counted.macs == 2 * (120 * 8 * 27 + 8 * 5)
    assert counted.activations == 2 * (120 * 8 + 5)


def test_the_inference_form_is_counted_and_the_model_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).train()
    counted = inference_cost(model, 10)
    assert counted.parameters == 3 * 8 * 9 + 8
    assert counted.macs == 100 * 8 * 27
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_whichever_kernel_runs_it(fused):
    tokens, dim, heads = 50, 32, 4
    attention = Attention(dim, num_heads=heads).eval()
    attention.fused_attn = fused
    counted = cost(attention, torch.randn(1, tokens, dim))
    assert counted.macs == tokens * dim * dim * 4 + 2 * tokens * tokens * dim
    assert counted.activations == tokens * dim * 4 + heads * tokens * tokens + tokens * dim


def test_peak_is_weights_and_the_maps_alive_together():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)).eval()
    images = torch.randn(1, 3, 64, 64)
    weights = sum(p.numel() for p in model.parameters())
    pixels = 64 * 64
    # The input stays with the caller; the widest moment holds the first map and the second.
    assert cost(model, images).peak_bytes == pytest.approx(4 * (weights + pixels * (3 + 16 + 4)), rel=0.05)
