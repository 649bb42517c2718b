"""BatchNorm of public models folds away without changing what they compute."""

import pytest
import timm
import torch
from torch import nn

import pipeline.student.regla  # noqa: F401
from pipeline.student.folding import inference_form

NORMS = nn.BatchNorm1d | nn.BatchNorm2d


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


@pytest.mark.parametrize("name", ["regla_t", "iformer_t", "efficientvit_b0", "repvit_m0_9", "mobilenetv4_conv_small"])
def test_folds_every_norm_of_a_public_model(live, name):
    torch.manual_seed(0)
    model, x = live(timm.create_model(name, num_classes=7)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        folded = inference_form(model, x)
        assert norms(folded) == 0
        assert torch.allclose(folded(x), expected, atol=1e-4 * float(expected.abs().max()))


class SharedInput(nn.Module):
    """A norm that shares its input with a skip connection, beside its convolution and further away."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        norm = nn.BatchNorm2d(4)
        self.branch = norm if beside else nn.Sequential(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + self.branch(y)


def test_a_norm_in_another_module_is_left_alone(live):
    model, x = live(SharedInput(beside=False)), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(inference_form(model, x)(x), expected)


def test_a_fold_that_would_change_the_outputs_is_an_error(live):
    with pytest.raises(RuntimeError, match="SharedInput"):
        inference_form(live(SharedInput(beside=True)), torch.randn(2, 3, 4, 4))
