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
import torch.nn.functional as F
from PIL import Image

from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayPool, Attached, Place, SharedArrayPool
from teachers.base import Interpolation

AT_ONCE = 8
"""Images of one piece of work, at least: handing over a single one costs as much as opening it."""

LEAST_FILES = 4 << 20
"""Bytes of the memory that the encoded images of a piece of work are laid into, at least; all pieces can use it again then."""

ATTEMPTS = 3
"""How often work is given to processes that are killed over it, as they are where memory runs out."""

log = logging.getLogger(__name__)


def at_once(batch_size: int) -> int:
    """Images of one piece of work where several batches of this size are rendered at the same time.

    A piece that is given to a process takes about 300 us of this one, however large it is: with 8 images in place of 32 that
    was a quarter of the time that DINOv2-B takes for them on a GPU.
    """
    return max(AT_ONCE, batch_size // 8)


def decoders() -> int:
    """Threads or processes that render for what this process computes: as many as torch has threads, two at least."""
    return max(2, torch.get_num_threads())


class Drawing(NamedTuple):
    """One view of an image, and the array [3, H, W] uint8 that it is rendered into, of :meth:`Renderer.rows`."""

    view: View
    interpolation: Interpolation
    pixels: np.ndarray | Place


Work = Sequence[tuple[bytes | Place, Sequence[Drawing]]]
"""Encoded images, each with what is drawn of it; as places where another process does it."""


@dataclass
class Pending:
    """Work that was handed over, and the memory that its encoded images lie in where processes do it."""

    work: Work
    done: Future[None]
    files: np.ndarray | None = None


class Renderer:
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

    def rows(self, array: np.ndarray) -> Sequence[np.ndarray | Place]:
        """What to render into for each row of such an array."""
        return self.arrays.places(array) if isinstance(self.arrays, SharedArrayPool) else list(array)

    def submit(self, work: Work) -> Pending:
        """Hand work over. Its arrays must be kept until :meth:`finish` has returned."""
        if not isinstance(self.arrays, SharedArrayPool):
            return Pending(work, self._given(work))
        placed, files = _shared(work, self.arrays)
        return Pending(placed, self._given(placed), files)

    def finish(self, pending: Sequence[Pending]) -> None:
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

    def render(self, work: Work) -> None:
        """Hand work over in pieces, and wait for it; raises as :meth:`finish`."""
        size = at_once(len(work))
        self.finish([self.submit(work[first : first + size]) for first in range(0, len(work), size)])

    def close(self) -> None:
        """End threads or processes when what they are at is done."""
        self.pool.shutdown(cancel_futures=True)

    def _given(self, work: Work) -> Future[None]:
        with self.lock:
            try:
                return self.pool.submit(_draw, work)
            except BrokenProcessPool:
                self.pool = self._start()
                return self.pool.submit(_draw, work)

    def _start(self) -> Executor:
        if not isinstance(self.arrays, SharedArrayPool):
            return ThreadPoolExecutor(self.workers)
        pool = ProcessPoolExecutor(self.workers, helper_context(__name__), become_helper)
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        return pool


def _shared(work: Work, arrays: SharedArrayPool) -> tuple[Work, np.ndarray]:
    """The work with places for its encoded images, and their memory: they would take longer through a pipe."""
    encoded = [data for data, _ in work if isinstance(data, bytes)]
    ends = [*accumulate(map(len, encoded), initial=0)]
    files = arrays.empty(1 << max(LEAST_FILES - 1, ends[-1]).bit_length())
    files[: ends[-1]] = np.frombuffer(b"".join(encoded), np.uint8)
    pid, file, size, start, _ = arrays.place(files)
    places = [Place(pid, file, size, start + first, (last - first,)) for first, last in pairwise(ends)]
    return [(place, drawings) for place, (_, drawings) in zip(places, work, strict=True)], files


def helper_context(module: str) -> ForkServerContext:
    """Starts processes that help this one, which has CUDA or threads and must not be forked; they need this module."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def become_helper() -> None:
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


_attached = Attached()


def _draw(work: Work) -> None:
    for data, drawings in work:
        image = decode_pixels(_attached.array(data).tobytes() if isinstance(data, Place) else data)
        for view, interpolation, pixels in drawings:
            place = _attached.array(pixels) if isinstance(pixels, Place) else pixels
            place[:] = render(image, view, place.shape[1:], interpolation)


def render(
    image: np.ndarray | Image.Image, view: View, size: tuple[int, ...], interpolation: Interpolation
) -> np.ndarray:
    """Cut the view's box, at whole pixels, from an RGB image, resize once with antialiasing, then flip.

    The resizing is torch's of 8-bit pixels, which is within one level of Pillow's and four times as fast.

    Args:
        image: [H, W, 3] uint8, or Pillow's.
        view: what is cut.
        size: (height, width) in pixels.
        interpolation: of the resizing.

    Returns:
        [3, height, width] uint8, contiguous, as torch's resizing gives it: numpy takes as long to turn it round.
    """
    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    (top, bottom), (left, right) = (
        _whole_pixels(view.box[axis], view.box[axis + 2], pixels.shape[1 - axis]) for axis in (1, 0)
    )
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    if planes.shape[1:] != size:
        planes = F.interpolate(planes[None], size, mode=interpolation, align_corners=False, antialias=True)[0]
    drawn: np.ndarray = (planes.flip(-1) if view.flip else planes).contiguous().numpy()
    return drawn


def _whole_pixels(start: float, end: float, length: int) -> tuple[int, int]:
    """The nearest pixels to a stretch given as fractions of a length; one at least."""
    first = min(round(start * length), length - 1)
    return first, max(round(end * length), first + 1)
