"""A pool of threads or processes that decode images, cut views and resize them.

Threads take turns in Python bytecode. On a CPU-only machine that costs nothing; beside a GPU it is the bottleneck: on 16
cores they decoded 2,900 images of 256 px a second, and delayed the thread that launches GPU kernels. There the workers are
processes, which write pixels into memory that they share with this one. Imports neither Ray nor MLflow.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_pad, crop_and_resize, mix_in
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayHandle, ArrayPool, AttachedArrays, SharedArrayPool
from pipeline.runtime.helper_process import helper_process_context, init_helper_process
from teachers.base import Interpolation

MIN_CHUNK = 8
"""Minimum number of images per submission: submitting a single one costs as much as decoding it."""

MIN_STAGING_BYTES = 4 << 20
"""Minimum size of a staging buffer for encoded images; buffers of one size can be reused."""

ATTEMPTS = 3
"""Submissions of the same images when worker processes are killed, as they are when memory runs out."""

log = logging.getLogger(__name__)


def chunk_size(batch_size: int) -> int:
    """Images per submission when several batches of this size are decoded concurrently.

    Each submission to a process costs this one about 300 us, whatever its size: for 8 images, a quarter of the time that
    DINOv2-B takes on a GPU.
    """
    return max(MIN_CHUNK, batch_size // 8)


def decoder_count() -> int:
    """Number of decoders for the computation of one process: torch's number of threads, at least two."""
    return max(2, torch.get_num_threads())


class Partner(NamedTuple):
    """What a view is mixed with: an encoded image, a view of it, and the share of the view itself."""

    data: bytes | ArrayHandle
    view: View
    share: float


class CropTask(NamedTuple):
    """A view of an image, how to resize it, and the uint8 array of :meth:`ArrayPool.row_targets` to write.

    A target of [3, H, W] takes the squashed view, one of [4, H, W] the padded view and its mask.
    """

    view: View
    interpolation: Interpolation
    target: np.ndarray | ArrayHandle
    partner: Partner | None = None


DecodeTasks = Sequence[tuple[bytes | ArrayHandle, Sequence[CropTask]]]
"""Encoded images, each with the crops to make from it."""


@dataclass
class PendingDecode:
    """Submitted tasks; if processes decode them, `staging` holds their encoded images."""

    tasks: DecodeTasks
    future: Future[None]
    staging: np.ndarray | None = None


class DecoderPool:
    """Decodes into arrays that its pool `arrays` allocates and reuses.

    Args:
        workers: number of threads or processes.
        processes: use processes; on systems other than Linux, which lack the shared memory for it, threads.
    """

    def __init__(self, workers: int, processes: bool = False) -> None:
        self.workers, self.lock = workers, threading.Lock()
        self.work: Callable[[DecodeTasks], None] = decode_tasks
        self.arrays: ArrayPool = SharedArrayPool() if processes and sys.platform == "linux" else ArrayPool()
        self.pool = self._start()

    def submit(self, tasks: DecodeTasks) -> PendingDecode:
        """Start tasks. Keep their target arrays until :meth:`finish` has returned."""
        staging = None
        if isinstance(self.arrays, SharedArrayPool):
            tasks, staging = _stage(tasks, self.arrays)
        return PendingDecode(tasks, self._submit(tasks), staging)

    def finish(self, pending: Sequence[PendingDecode]) -> None:
        """Wait for all of these tasks.

        Raises:
            UserError: for the first image that cannot be decoded, after all tasks have ended. The images of a cache could be
                when they were taken in, though by an older version, which accepted more.
        """
        for attempt in range(1, ATTEMPTS + 1):
            wait([one.future for one in pending])
            broken = [one for one in pending if isinstance(one.future.exception(), BrokenProcessPool)]
            if not broken or attempt == ATTEMPTS:
                break
            log.warning("a process that decodes images was killed; if memory ran out, use a smaller cache.batch_size")
            for one in broken:
                one.future = self._submit(one.tasks)
        for one in pending:
            try:
                one.future.result()
            except ValueError as error:
                raise UserError(
                    f"an image in the cache {error}; an earlier version accepted it: convert it in its source, and run the job "
                    "again"
                ) from error

    def decode(self, tasks: DecodeTasks) -> None:
        """Run tasks in chunks and wait for them; raises as :meth:`finish`."""
        size = chunk_size(len(tasks))
        self.finish([self.submit(tasks[first : first + size]) for first in range(0, len(tasks), size)])

    def close(self) -> None:
        """Shut down the workers after their current tasks."""
        self.pool.shutdown(cancel_futures=True)

    def _submit(self, tasks: DecodeTasks) -> Future[None]:
        with self.lock:
            try:
                return self.pool.submit(self.work, tasks)
            except BrokenProcessPool:
                self.pool = self._start()
                return self.pool.submit(self.work, tasks)

    def _start(self) -> Executor:
        if not isinstance(self.arrays, SharedArrayPool):
            return ThreadPoolExecutor(self.workers)
        pool = ProcessPoolExecutor(self.workers, helper_process_context(__name__), init_helper_process)
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        return pool


def _stage(tasks: DecodeTasks, arrays: SharedArrayPool) -> tuple[DecodeTasks, np.ndarray]:
    """The tasks with their encoded images in shared memory, which is faster than a pipe, and that memory."""
    encoded = [data for data, crops in tasks for data in (data, *_partners(crops)) if isinstance(data, bytes)]
    ends = [*accumulate(map(len, encoded), initial=0)]
    staging = arrays.empty(1 << max(MIN_STAGING_BYTES - 1, ends[-1]).bit_length())
    staging[: ends[-1]] = np.frombuffer(b"".join(encoded), np.uint8)
    whole = arrays.handle(staging)
    handles = (whole.part(first, (last - first,)) for first, last in pairwise(ends))
    staged: list[tuple[ArrayHandle, Sequence[CropTask]]] = []
    for _, crops in tasks:
        own = next(handles)
        moved = [
            crop._replace(partner=crop.partner._replace(data=next(handles))) if crop.partner else crop for crop in crops
        ]
        staged.append((own, moved))
    return staged, staging


def _partners(crops: Sequence[CropTask]) -> list[bytes | ArrayHandle]:
    """The encoded images that crops are mixed with, in order."""
    return [crop.partner.data for crop in crops if crop.partner]


_attached = AttachedArrays()


def encoded_bytes(data: bytes | ArrayHandle) -> bytes:
    """An encoded image of `DecodeTasks`, in a worker."""
    return _attached.array(data).tobytes() if isinstance(data, ArrayHandle) else data


def target_array(target: np.ndarray | ArrayHandle) -> np.ndarray:
    """The array of a `CropTask`, in a worker."""
    return _attached.array(target) if isinstance(target, ArrayHandle) else target


def decode_tasks(tasks: DecodeTasks) -> None:
    """Run tasks on a core, in a worker; ValueError for the first image that cannot be decoded."""
    for data, crops in tasks:
        image = decode_pixels(encoded_bytes(data))
        for view, interpolation, target, partner in crops:
            pixels = target_array(target)
            crop = crop_and_pad if len(pixels) == 4 else crop_and_resize
            pixels[:] = crop(image, view, pixels.shape[1:], interpolation)
            if partner:
                other = decode_pixels(encoded_bytes(partner.data))
                mix_in(pixels, image, view, other, partner.view, partner.share, interpolation)
