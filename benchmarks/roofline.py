"""Operators of a computation, and the least time that a card needs for them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from benchmarks.card import Card

KEPT = ("mm", "conv", "attention", "norm", "adam", "foreach", "amp")
"""Parts of the names of operators that no compiler fuses into another: products, and what reads its whole input first."""


@dataclass(frozen=True)
class Operator:
    """One call that computes something: `dtype` of its result, operations, and bytes read and written."""

    name: str
    dtype: torch.dtype
    flops: float
    bytes: float

    def seconds(self, card: Card) -> float:
        """Least time by the roofline model (Williams et al. 2009)."""
        return max(self.flops / card.flops.get(self.dtype, card.flops[torch.float32]), self.bytes / card.bandwidth)


class OperatorLog(TorchDispatchMode):
    """Records the operators that compute something; views and allocations do not. On a GPU each launches a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of one operator."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in flop_registry:
            with self:  # in inference mode composite operators arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not func.is_view and "empty" not in func._overloadpacket.__name__:
            given, made = (
                [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), out)
            )
            if given or made:
                dtype = made[0].dtype if made else torch.float32
                moved = float(sum(tensor.numel() * tensor.element_size() for tensor in given + made))
                flops = _flops(func, args, kwargs, out)
                self.operators.append(Operator(func._overloadpacket.__name__, dtype, flops, moved))
        return out


@contextmanager
def operators() -> Iterator[list[Operator]]:
    """The operators that run in this block, forward, backward and optimiser."""
    with OperatorLog() as log:
        yield log.operators


def floor(found: Iterable[Operator], card: Card, fused: bool) -> float:
    """Least seconds for these operators one after the other.

    Args:
        fused: whether all but `KEPT` cost nothing, because a compiler computes them within another.
    """
    return sum(one.seconds(card) for one in found if not fused or any(part in one.name for part in KEPT))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # which torch does not know
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
