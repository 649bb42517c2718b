"""FlexAttention, with which SAM's own kernels are compared, computes the same attention."""

import pytest
import torch

from benchmarks.sam_attention import count_products, flex_forward
from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher

ARGS = {"embed_dim": 96, "num_heads": 2, "depth": 1, "global_attn_indexes": (0,)}


def _teacher():
    teacher = make_teacher(TeacherConfig(model="sam/vit_b", weights="random", input_size=128, args=ARGS))
    teacher.load()
    return teacher


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_adds_the_biases_of_relative_positions():
    attention = _teacher().model.blocks[0].attn
    with torch.no_grad():
        for table in (attention.rel_pos_h, attention.rel_pos_w):
            table.normal_()
        x = torch.randn(2, 8, 8, 96)
        torch.testing.assert_close(flex_forward(attention, x), attention(x), rtol=1e-4, atol=1e-5)


def test_products_are_those_of_layers_attention_and_positions():
    width, patches, side = 96, 64, 8
    layers = patches * width * width * (3 + 1 + 8)
    attention = 2 * patches * patches * width + 2 * patches * side * width
    ends = patches * (3 * 16 * 16 * width + width * 256 + 9 * 256 * 256)
    assert count_products(_teacher().model.to("meta"), 128) == 2 * (layers + attention + ends)
