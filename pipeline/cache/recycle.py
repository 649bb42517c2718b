"""Memory that is used again: the first write to fresh pages costs several times the copy that it is for."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np


class ArrayPool:
    """Lends uint8 arrays, and takes their memory back when the array, and every tensor made of it, is gone.

    Tensors of `torch.from_numpy` hold the array; numpy's own views of it do not, and must not outlive it.
    """

    def __init__(self) -> None:
        self.free: defaultdict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def empty(self, *shape: int) -> np.ndarray:
        """An array of this shape, its content undefined."""
        free = self.free[shape]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, np.uint8)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent
