"""Decoding and resizing many images at once, on threads or on processes.

Threads of one interpreter take turns in its bytecode. Beside a CPU's forward that costs nothing; beside a GPU it is the limit:
on 16 cores they rendered 2,900 images of 256 px a second, and held up the thread that feeds the GPU. So there the work is
done by processes, which write the pixels into memory that they share with this one. Imports neither Ray nor MLflow.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate, pairwise
from multiprocessing import get_context, parent_process
from multiprocessing.context import ForkServerContext
from typing import NamedTuple

import numpy as np
import torch

from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayHandle, ArrayPool, AttachedArrays, SharedArrayPool
from teachers.base import Interpolation

MIN_CHUNK = 8
"""Images of one piece of work, at least: handing over a single one costs as much as opening it."""

MIN_STAGING_BYTES = 4 << 20
"""Bytes of the memory that the encoded images of a piece of work are laid into, at least; all pieces can use it again then."""

ATTEMPTS = 3
"""How often work is given to processes that are killed over it, as they are where memory runs out."""

log = logging.getLogger(__name__)


def chunk_size(batch_size: int) -> int:
    """Images of one piece of work where several batches of this size are rendered at the same time.

    A piece that is given to a process takes about 300 us of this one, however large it is: with 8 images in place of 32 that
    was a quarter of the time that DINOv2-B takes for them on a GPU.
    """
    return max(MIN_CHUNK, batch_size // 8)


def decoder_count() -> int:
    """Threads or processes that render for what this process computes: as many as torch has threads, two at least."""
    return max(2, torch.get_num_threads())


class CropTask(NamedTuple):
    """One view of an image, and the array [3, H, W] uint8 that it is rendered into, of :meth:`DecoderPool.rows`."""

    view: View
    interpolation: Interpolation
    pixels: np.ndarray | ArrayHandle


DecodeTasks = Sequence[tuple[bytes | ArrayHandle, Sequence[CropTask]]]
"""Encoded images, each with what is drawn of it; as places where another process does it."""


@dataclass
class PendingDecode:
    """DecodeTasks that was handed over, and the memory that its encoded images lie in where processes do it."""

    work: DecodeTasks
    done: Future[None]
    files: np.ndarray | None = None


class DecoderPool:
    """Renders into arrays that it lends.

    Args:
        workers: threads or processes.
        processes: whether they are processes; where the system has no memory to share with them they are threads.
    """

    def __init__(self, workers: int, processes: bool = False) -> None:
        self.workers, self.lock = workers, threading.Lock()
        self.arrays: ArrayPool = SharedArrayPool() if processes and sys.platform == "linux" else ArrayPool()
        self.pool = self._start()

    def empty(self, *shape: int) -> np.ndarray:
        """An array of this shape to render into, uint8, its content undefined; used again when it is gone."""
        return self.arrays.empty(*shape)

    def row_targets(self, array: np.ndarray) -> Sequence[np.ndarray | ArrayHandle]:
        """What to render into for each row of such an array."""
        return self.arrays.row_handles(array) if isinstance(self.arrays, SharedArrayPool) else list(array)

    def submit(self, work: DecodeTasks) -> PendingDecode:
        """Hand work over. Its arrays must be kept until :meth:`finish` has returned."""
        if not isinstance(self.arrays, SharedArrayPool):
            return PendingDecode(work, self._given(work))
        placed, files = _shared(work, self.arrays)
        return PendingDecode(placed, self._given(placed), files)

    def finish(self, pending: Sequence[PendingDecode]) -> None:
        """Wait for all of this.

        Raises:
            ValueError: of the first image that cannot be decoded, when everything is done.
        """
        for attempt in range(1, ATTEMPTS + 1):
            wait([one.done for one in pending])
            broken = [one for one in pending if isinstance(one.done.exception(), BrokenProcessPool)]
            if not broken or attempt == ATTEMPTS:
                break
            log.warning("a process that decodes images was killed; if memory ran out, use a smaller cache.batch_size")
            for one in broken:
                one.done = self._given(one.work)
        for one in pending:
            one.done.result()

    def render(self, work: DecodeTasks) -> None:
        """Hand work over in pieces, and wait for it; raises as :meth:`finish`."""
        size = chunk_size(len(work))
        self.finish([self.submit(work[first : first + size]) for first in range(0, len(work), size)])

    def close(self) -> None:
        """End threads or processes when what they are at is done."""
        self.pool.shutdown(cancel_futures=True)

    def _given(self, work: DecodeTasks) -> Future[None]:
        with self.lock:
            try:
                return self.pool.submit(_draw, work)
            except BrokenProcessPool:
                self.pool = self._start()
                return self.pool.submit(_draw, work)

    def _start(self) -> Executor:
        if not isinstance(self.arrays, SharedArrayPool):
            return ThreadPoolExecutor(self.workers)
        pool = ProcessPoolExecutor(self.workers, helper_process_context(__name__), init_helper_process)
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        return pool


def _shared(work: DecodeTasks, arrays: SharedArrayPool) -> tuple[DecodeTasks, np.ndarray]:
    """The work with places for its encoded images, and their memory: they would take longer through a pipe."""
    encoded = [data for data, _ in work if isinstance(data, bytes)]
    ends = [*accumulate(map(len, encoded), initial=0)]
    files = arrays.empty(1 << max(MIN_STAGING_BYTES - 1, ends[-1]).bit_length())
    files[: ends[-1]] = np.frombuffer(b"".join(encoded), np.uint8)
    pid, file, size, start, _ = arrays.handle(files)
    places = [ArrayHandle(pid, file, size, start + first, (last - first,)) for first, last in pairwise(ends)]
    return [(place, crops) for place, (_, crops) in zip(places, work, strict=True)], files


def helper_process_context(module: str) -> ForkServerContext:
    """Starts processes that help this one, which has CUDA or threads and must not be forked; they need this module."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def init_helper_process() -> None:
    """Of a process that helps another: it computes on one thread, leaves Ctrl-C to that one, and ends with it.

    The processes of a pool hold each other's pipes open, so that none would see that nobody sends anything any more.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


_attached = AttachedArrays()


def _draw(work: DecodeTasks) -> None:
    for data, crops in work:
        image = decode_pixels(_attached.array(data).tobytes() if isinstance(data, ArrayHandle) else data)
        for view, interpolation, pixels in crops:
            place = _attached.array(pixels) if isinstance(pixels, ArrayHandle) else pixels
            place[:] = crop_and_resize(image, view, place.shape[1:], interpolation)
