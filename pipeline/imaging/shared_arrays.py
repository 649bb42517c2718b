"""Pools of reusable arrays: the first write to freshly mapped pages costs several times the copy itself."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from operator import itemgetter
from typing import NamedTuple

import numpy as np


class ArrayPool:
    """Allocates uint8 arrays, and reuses their memory once an array and every tensor made from it are garbage-collected.

    `torch.from_numpy` tensors keep the array alive; numpy views of it do not, and must not outlive it.
    """

    def __init__(self) -> None:
        self.free: defaultdict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def empty(self, *shape: int) -> np.ndarray:
        """An uninitialised array of this shape."""
        free = self.free[shape]
        try:
            memory = free.pop()
        except IndexError:
            memory = self._allocate(shape)
        array = memory.view()
        weakref.finalize(array, free.append, memory).atexit = False
        return array

    def row_targets(self, array: np.ndarray) -> Sequence[np.ndarray | ArrayHandle]:
        """Each row of an array of this pool, as workers can write to it."""
        return list(array)

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, np.uint8)


class ArrayHandle(NamedTuple):
    """Address of an array of a `SharedArrayPool` for other processes of this machine. Picklable.

    Attributes:
        pid, file: process and descriptor of the open file that holds the memory.
        size: of that file in bytes.
        start: offset of the array in it.
        shape: of the array.
    """

    pid: int
    file: int
    size: int
    start: int
    shape: tuple[int, ...]

    def part(self, offset: int, shape: tuple[int, ...]) -> ArrayHandle:
        """The handle of an array of this shape, `offset` bytes into this one."""
        return self._replace(start=self.start + offset, shape=shape)


class SharedArrayPool(ArrayPool):
    """Allocates arrays that other processes of this user can write to. Linux only.

    Their memory belongs to no file system (`memfd_create`): its size is limited by the machine's memory alone, and the kernel
    frees it with the last process that has it open, however that process ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        # Address, descriptor and size of each segment, sorted. Replaced as a whole, so that lookups need no lock.
        self.segments: tuple[tuple[int, int, int], ...] = ()
        self.files: list[int] = []
        weakref.finalize(self, _close, self.files)

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        size, file = prod(shape), os.memfd_create("arrays")
        os.ftruncate(file, size)
        memory = np.frombuffer(mmap.mmap(file, size), np.uint8)
        self.files.append(file)
        with self.lock:
            self.segments = tuple(sorted([*self.segments, (memory.ctypes.data, file, size)]))
        return memory.reshape(shape)

    def handle(self, array: np.ndarray) -> ArrayHandle:
        """The handle of a contiguous array of this pool, or of a contiguous view of one."""
        address, segments = array.ctypes.data, self.segments
        start, file, size = segments[bisect(segments, address, key=itemgetter(0)) - 1]
        return ArrayHandle(os.getpid(), file, size, address - start, array.shape)

    def row_targets(self, array: np.ndarray) -> list[ArrayHandle]:
        """The handle of each row of such an array."""
        whole, shape = self.handle(array), array.shape[1:]
        return [whole.part(row * prod(shape), shape) for row in range(len(array))]


class AttachedArrays:
    """Arrays of another process's pool; each segment is mapped once."""

    def __init__(self) -> None:
        self.segments: dict[tuple[int, int], mmap.mmap] = {}

    def array(self, handle: ArrayHandle) -> np.ndarray:
        """The array itself, writable; OSError if the process that allocated it has ended."""
        key = handle.pid, handle.file
        if key not in self.segments:
            with open(f"/proc/{handle.pid}/fd/{handle.file}", "r+b") as file:
                self.segments[key] = mmap.mmap(file.fileno(), handle.size)
        return np.frombuffer(self.segments[key], np.uint8, prod(handle.shape), handle.start).reshape(handle.shape)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
