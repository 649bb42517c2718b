"""Counted cost of a network: parameters, multiply-accumulates, activations, memory."""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pipeline.student.folding import inference_form


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        macs: multiply-accumulates of convolutions, linear layers and matrix products, attention's included.
        activations: elements of the outputs of the same operators, as in fvcore and the RegNet paper (arXiv 2003.13678).
        peak_bytes: largest total of the tensors alive at once (weights, buffers, input and maps), without scratch memory.
    """

    parameters: int
    macs: int
    activations: int
    peak_bytes: int


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Cost:
    """Count the cost of one forward pass of ``model``, in its current mode and form, on ``images`` (B, C, H, W)."""
    # The counter does not know the CPU's fused attention kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops, _Activations() as activations:
        model(images)
    with _Memory(chain(model.parameters(), model.buffers(), [images])) as memory:
        model(images)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=flops.get_total_flops() // 2,
        activations=activations.elements,
        peak_bytes=memory.peak,
    )


def inference_cost(model: nn.Module, input_size: int) -> Cost:
    """Cost of the inference form of ``model``, which is not changed, on one image of this side in pixels."""
    model, images = copy.deepcopy(model).cpu().eval(), torch.zeros(1, 3, input_size, input_size)
    return cost(inference_form(model, images), images)


class _Activations(TorchDispatchMode):
    """Sums the output elements of the operators whose FLOPs torch counts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry and isinstance(out, Tensor):
            self.elements += out.numel()
        return out


class _Memory(TorchDispatchMode):
    """Tracks live storages, beginning with those of ``tensors``; views share one."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.alive -= size
