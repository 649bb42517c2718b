from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.student.regla import ReGLA

TINY: dict[str, Any] = {
    "dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "heads": (2, 4),
    "qk_dim": 8,
    "num_classes": 10,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., ReGLA]:
    """Factory of a ReGLA that is small enough for every option to be tried; keyword arguments override ``TINY``."""
    return lambda **options: ReGLA(**{**TINY, **options})


@pytest.fixture
def live() -> Callable[[nn.Module], nn.Module]:
    """Randomise weights, BatchNorm and layer scale, so that no term is 0 or 1 by accident, and go to eval mode.

    The scales keep activations of order one through the depth, as in a trained network.
    """

    def liven(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.3, 0.9)
                nn.init.normal_(module.bias, std=0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                nn.init.uniform_(parameter, 0.2, 0.8)
        return model.eval()

    return liven
