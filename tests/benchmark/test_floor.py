"""Operators, operations and bytes as counted, and the least time that follows from them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.card import Card
from benchmarks.floor import main
from benchmarks.roofline import floor, operators

CARD = Card({torch.float32: 1e3, torch.bfloat16: 1e4}, 1e2)


@pytest.mark.parametrize("inference", [False, True])
def test_a_linear_layer_is_its_product_and_the_bytes_that_it_reads_and_writes(inference):
    layer, x = nn.Linear(8, 16), torch.rand(4, 8)
    with torch.inference_mode(inference), operators() as found:
        F.relu(layer(x).view(8, 8).clone())
    product, copy, relu = found
    assert product.flops == 2 * 4 * 8 * 16
    assert product.bytes == 4 * (16 + 4 * 8 + 8 * 16 + 4 * 16)
    assert (copy.flops, copy.bytes) == (0, 2 * 4 * 64)
    assert product.seconds(CARD) == pytest.approx(max(1024 / 1e3, product.bytes / 1e2))
    assert floor(found, CARD, fused=False) == pytest.approx(sum(one.seconds(CARD) for one in (product, copy, relu)))
    assert floor(found, CARD, fused=True) == pytest.approx(product.seconds(CARD))


def test_attention_on_a_cpu_counts_both_of_its_products():
    heads = [torch.rand(2, 3, 5, 8) for _ in range(3)]
    with torch.no_grad(), operators() as found:
        F.scaled_dot_product_attention(*heads)
    assert sum(one.flops for one in found) == 2 * 2 * (2 * 3 * 5 * 5 * 8)


@pytest.mark.slow
def test_steps_and_extraction_are_counted_and_compiling_fuses_kernels(capsys):
    main(
        [
            *("--student", "timm/test_resnet", "--image-size", "64", "--head-dim", "32"),
            *("--teacher", "timm/test_vit", "--batch-size", "8", "--compiled"),
            *("--models", "regla_t", "--inference-size", "64"),
        ]
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    least, compiled = figures["least"], figures["compiled"]
    for kind in ("student", "cached"):
        counted = least[f"step: {kind}"]
        assert 0 < counted["ms"]["H200"][1] < counted["ms"]["H200"][0] <= counted["ms"]["H100"][0]
        assert 0 < compiled[kind]["rest"] < compiled[kind]["all"] < counted["operators"]
    assert least["step: student"]["operators"] < least["step: cached"]["operators"]
    assert least["batch: codec"]["gb"] > 0
