"""Memory that is used again: the first write to fresh pages costs several times the copy that it is for."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from bisect import bisect
from collections import defaultdict
from operator import itemgetter
from typing import NamedTuple

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
            memory = self._allocate(shape)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, np.uint8)


class ArrayHandle(NamedTuple):
    """Where an array of a `SharedArrayPool` lies, for other processes of this machine.

    Attributes:
        pid, file: process and number of the open file that is the memory.
        size: of that file in bytes.
        start: of the array in it.
        shape: of the array.
    """

    pid: int
    file: int
    size: int
    start: int
    shape: tuple[int, ...]


class SharedArrayPool(ArrayPool):
    """Lends arrays that other processes of this user can write to.

    Their memory belongs to no file system (`memfd_create`): it is limited by the machine's memory alone, and gone with the
    last process that has it, however that ends. Linux only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        # Start, file and size of each; a new tuple for every block, so that who looks one up meets no half of a change.
        self.blocks: tuple[tuple[int, int, int], ...] = ()
        self.files: list[int] = []
        weakref.finalize(self, _close, self.files)

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        file = os.memfd_create("arrays")
        os.ftruncate(file, size)
        memory = np.frombuffer(mmap.mmap(file, size), np.uint8)
        self.files.append(file)
        with self.lock:
            self.blocks = tuple(sorted([*self.blocks, (_address(memory), file, size)]))
        return memory.reshape(shape)

    def handle(self, array: np.ndarray) -> ArrayHandle:
        """Where a contiguous array lies that is, or is a view of, one that was lent."""
        address, blocks = _address(array), self.blocks
        start, file, size = blocks[bisect(blocks, address, key=itemgetter(0)) - 1]
        return ArrayHandle(os.getpid(), file, size, address - start, array.shape)

    def row_handles(self, array: np.ndarray) -> list[ArrayHandle]:
        """The places of the rows of such an array."""
        pid, file, size, start, shape = self.handle(array)
        step = int(np.prod(shape[1:]))
        return [ArrayHandle(pid, file, size, start + row * step, shape[1:]) for row in range(len(array))]


class AttachedArrays:
    """The arrays at places of another process; each of its files is mapped once."""

    def __init__(self) -> None:
        self.files: dict[tuple[int, int], mmap.mmap] = {}

    def array(self, place: ArrayHandle) -> np.ndarray:
        """The array there, to write to."""
        key = place.pid, place.file
        if key not in self.files:
            with open(f"/proc/{place.pid}/fd/{place.file}", "r+b") as file:
                self.files[key] = mmap.mmap(file.fileno(), place.size)
        count = int(np.prod(place.shape))
        return np.frombuffer(self.files[key], np.uint8, count, place.start).reshape(place.shape)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
