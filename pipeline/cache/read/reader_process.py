"""A reader in a process of its own, for training on a GPU.

What a reader does between its reads and copies is bytecode, for which it takes turns with the thread that launches the GPU's
work. Of that nothing is left here: the other process reads, joins and decodes into memory that both share, and says where
each batch lies. When a batch is gone here its memory is used again there.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import util
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.read.reader import Batch, CacheReader, ShuffleQuality
from pipeline.imaging.decoder_pool import helper_process_context, init_helper_process
from pipeline.imaging.shared_arrays import ArrayHandle, AttachedArrays, SharedArrayPool
from pipeline.runtime.allocator import keep_freed_memory

AHEAD = 2
"""Batches that are ready before they are asked for."""


Name = tuple[str, str]
"""Of an array: teacher id and token type; `IMAGES` for the pixels."""
IMAGES: Name = ("", "images")

Said = tuple[int, list[str], np.ndarray, tuple[int, int], dict[Name, ArrayHandle]]
"""Number of a batch, its keys, labels and place in the order of training, and where its arrays lie."""


class ReaderProcess:
    """A `CacheReader` in another process: the same batches in the same order, one iteration at a time.

    Args:
        *args, **settings: of `CacheReader`.

    Raises:
        UserError: as `CacheReader`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.reader = CacheReader(*args, **settings)  # for the order, which is a function of the settings
        self.work = args, {**settings, "processes": True}
        self.gone: deque[int] = deque()
        self.process: Any = None
        self.attached: AttachedArrays
        self.pipe: Connection

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return self.reader.steps(epoch)

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """As of `CacheReader`."""
        return self.reader.shuffle_quality(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on.

        Raises:
            UserError: as `CacheReader.batches`.
            RuntimeError: where the other process was killed.
        """
        if self.process is None:
            self._start()
        self._tell("read", epoch, start)
        try:
            while (said := self._hear()) is not None:
                self._tell("took")
                yield self._received(said)
        except GeneratorExit:
            if self.pipe.closed:  # this process ends
                return
            self._tell("stop")
            while (said := self._hear()) is not None:
                self.gone.append(said[0])
            raise

    def _start(self) -> None:
        context = helper_process_context(__name__)
        self.gone = deque()  # what is left of a process that was killed notes its end in the old one
        self.attached = AttachedArrays()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.work))
        self.process.start()
        theirs.close()
        util.Finalize(self, self.pipe.close, exitpriority=10)  # before this process waits for the other one to end

    def _tell(self, what: str, *order: int) -> None:
        """Say something, and with it which batches are gone."""
        gone = [self.gone.popleft() for _ in range(len(self.gone))]
        try:
            self.pipe.send((what, gone, order))
        except OSError as error:
            raise self._killed() from error

    def _hear(self) -> Said | None:
        """The next batch, or None after the last."""
        try:
            said: Said | Exception | None = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._killed() from error
        if isinstance(said, Exception):
            raise said
        return said

    def _killed(self) -> RuntimeError:
        self.process.join(5)
        code, self.process = self.process.exitcode, None
        return RuntimeError(
            f"the process that reads the cache has ended with {code}; if memory ran out, lower train.shuffle_window"
        )

    def _received(self, said: Said) -> Batch:
        number, keys, labels, place, places = said
        try:
            arrays = {name: self.attached.array(where).view() for name, where in places.items()}
        except OSError as error:  # it said so, and was killed before its memory was reached
            raise self._killed() from error
        loan = _Loan(number, len(arrays), self.gone)
        for array in arrays.values():
            weakref.finalize(array, loan.end).atexit = False
        images = torch.from_numpy(arrays.pop(IMAGES))
        features: dict[str, dict[str, Tensor]] = {}
        for (teacher, kind), rows in arrays.items():
            features.setdefault(teacher, {})[kind] = torch.from_numpy(rows)
        return Batch(keys, images, torch.from_numpy(labels), features, place)


class _Loan:
    """Counts what is left of a batch. Its end may come in any thread, in the middle of anything: it is only noted."""

    def __init__(self, number: int, parts: int, gone: deque[int]) -> None:
        self.number, self.parts, self.gone = number, deque(range(parts)), gone

    def end(self) -> None:
        if self.parts.pop() == 0:
            self.gone.append(self.number)


def _serve(pipe: Connection, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """The other process."""
    init_helper_process()
    keep_freed_memory()
    _Server(pipe, CacheReader(*args, **settings)).run()


class _Server:
    def __init__(self, pipe: Connection, reader: CacheReader) -> None:
        self.pipe, self.reader = pipe, reader
        self.lent: dict[int, Batch] = {}
        self.number = 0
        self.orders: SimpleQueue[tuple[int, ...] | None] = SimpleQueue()
        self.room, self.stopped = threading.Semaphore(AHEAD), threading.Event()

    def run(self) -> None:
        """Serve until the other side is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        while order := self.orders.get():
            answer = None
            try:
                self._send_batches(*order)
            except Exception as error:  # noqa: BLE001  the other side's to handle
                answer = error
            with suppress(OSError):
                self.pipe.send(answer)
        self.reader.close()

    def _listen(self) -> None:
        """Take orders, and hear which memory is free."""
        while True:
            try:
                what, gone, order = self.pipe.recv()
            except (EOFError, OSError):
                self.orders.put(None)
                self.stopped.set()
                self.room.release()
                return
            for number in gone:
                del self.lent[number]
            if what == "read":
                # Its own release, below, makes room for one more.
                self.room, self.stopped = threading.Semaphore(AHEAD - 1), threading.Event()
                self.orders.put(order)
            elif what == "stop":
                self.stopped.set()
            self.room.release()

    def _send_batches(self, epoch: int, start: int) -> None:
        arrays, room, stopped = self.reader.arrays, self.room, self.stopped
        assert isinstance(arrays, SharedArrayPool)
        for batch in self.reader.batches(epoch, start):
            room.acquire()
            if stopped.is_set():
                return
            self.lent[self.number] = batch
            features = {(name, kind): raw for name, kinds in batch.features.items() for kind, raw in kinds.items()}
            places = {name: arrays.handle(raw.numpy()) for name, raw in {IMAGES: batch.images, **features}.items()}
            said: Said = (self.number, batch.keys, batch.labels.numpy(), batch.position, places)
            self.number += 1
            self.pipe.send(said)
