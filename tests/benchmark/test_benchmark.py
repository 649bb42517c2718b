"""A network that is made ready in one form stays as it was for the next."""

import pytest
import timm
import torch

from pipeline.benchmark.benchmark import runner


@pytest.mark.parametrize("form", ["eager", "fused"])
def test_the_model_is_left_as_it_is(form):
    model, images = timm.create_model("test_resnet", num_classes=3).eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        runner(model, form, images, "bfloat16", 1)()
        assert torch.equal(model(images), expected)
