"""What a network costs by counting: parameters, multiply-accumulates, activations, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        parameters: of the model.
        macs: multiply-accumulates of convolutions, linear layers and matrix products, attention's included.
        activations: elements of the outputs of the same operators, as fvcore and the RegNet paper (arXiv 2003.13678)
            count them.
        peak_bytes: largest sum of bytes of all tensors alive at once: weights, buffers, input and intermediate maps; the
            scratch memory of a kernel is not seen.
    """

    parameters: int
    macs: int
    activations: int
    peak_bytes: int


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Cost:
    """Count the cost of one forward pass of ``model``, in the mode and form it is in, on ``images`` (B, C, H, W)."""
    memory = MemTracker()
    memory.track_external(model, images)
    # The fused attention kernel of the CPU is unknown to the counter; the plain form consists of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops, _Activations() as activations:
        model(images)
    with memory:
        model(images)
    peak = memory.get_tracker_snapshot("peak")
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=flops.get_total_flops() // 2,
        activations=activations.elements,
        peak_bytes=sum(int(sizes["Total"]) for sizes in peak.values()),
    )


class _Activations(TorchDispatchMode):
    """Sums the output elements of the operators whose multiplications torch counts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry and isinstance(out, Tensor):
            self.elements += out.numel()
        return out
