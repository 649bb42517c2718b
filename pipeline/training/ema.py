"""The exponential moving average of a module's weights, which is evaluated and exported."""

from copy import deepcopy

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")
"""Buffers of BatchNorm, averaged like weights."""


class ModelEma:
    """An exponential moving average of parameters and of BatchNorm's statistics, in evaluation mode as `module`.

    Other buffers are shared with the trained module. The decay of an update is min(`decay`, (1 + steps) / (10 + steps)), as
    in TensorFlow's ExponentialMovingAverage, so that the initial weights soon lose their influence: it reaches 0.99 after
    890 steps and 0.9998 after 44,990.

    Args:
        module: on its device, in its memory format. It may be compiled or wrapped later, but its tensors may only change in
            place.
        decay: in [0, 1); 0: no averaging.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        own = {id(buffer): buffer for name, buffer in module.named_buffers() if not name.endswith(_STATISTICS)}
        self.module = deepcopy(module, own).eval()
        self._current, self._averaged = _averaged_tensors(module), _averaged_tensors(self.module)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Average in the current weights, after this number of optimiser steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)


def _averaged_tensors(module: nn.Module) -> list[Tensor]:
    statistics = [buffer for name, buffer in module.named_buffers() if name.endswith(_STATISTICS)]
    return [*module.parameters(), *statistics]
