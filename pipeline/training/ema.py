"""The average of a module's weights over the steps of its training: what is evaluated and kept."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")
"""Buffers of BatchNorm that are averaged as weights are."""


class ModelEma:
    """An exponential moving average of parameters and of BatchNorm's statistics.

    The decay of an update is min(`decay`, (1 + steps) / (10 + steps)), the rule of TensorFlow's ExponentialMovingAverage,
    by which the first weights are soon forgotten: 0.99 is reached after 890 steps, 0.9998 after 44,990.

    Every other buffer (constants, queues, counts) is the module's own, shared by both, so that there is nothing to copy.

    Args:
        module: on its device, in its memory format; from here on its tensors change in place alone, as they do in training
            and `load_state_dict`. It may be compiled or wrapped later.
        decay: in [0, 1); 0: the weights as they are.

    Attributes:
        module: the average, in evaluation mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        own = {id(buffer): buffer for name, buffer in module.named_buffers() if not name.endswith(_STATISTICS)}
        self.module = deepcopy(module, own).eval()
        self._now, self._averaged = _followed(module), _followed(self.module)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the weights in as they are now.

        Args:
            steps: of the optimiser, done.
        """
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averaged, self._now, 1 - decay)


def _followed(module: nn.Module) -> list[Tensor]:
    statistics = [buffer for name, buffer in module.named_buffers() if name.endswith(_STATISTICS)]
    return [*module.parameters(), *statistics]
