"""A cache reader in a process of its own, for training on a GPU.

Between its reads and copies a reader runs Python bytecode, which competes for the interpreter lock with the thread that
launches GPU kernels. Here another process reads, joins and decodes into shared memory, and sends only where each batch lies.
Once a batch has been garbage-collected in this process, the other one reuses its memory.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.imaging.shared_arrays import ArrayHandle, AttachedArrays, SharedArrayPool
from pipeline.runtime.allocator import keep_freed_memory
from pipeline.runtime.helper_process import helper_process_context, init_helper_process

AHEAD = 2
"""Batches that are sent before they are asked for."""


class BatchMessage(NamedTuple):
    """A `Batch` on its way between the processes; its memory is released by `number`."""

    number: int
    keys: list[str]
    labels: np.ndarray
    position: tuple[int, int]
    images: ArrayHandle
    features: dict[str, dict[str, ArrayHandle]]


class ReaderProcess:
    """A `CacheReader` in another process: the same arguments, errors, and batches; one iteration at a time."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.order = CacheReader(*args, **settings).order
        self.steps, self.shuffle_quality = self.order.steps, self.order.shuffle_quality
        self.arguments = args, {**settings, "processes": True}
        self.released: deque[int] = deque()
        self.process: Any = None
        self.attached: AttachedArrays
        self.pipe: Connection

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As `CacheReader.batches`; RuntimeError if the other process was killed."""
        if self.process is None:
            self._start()
        self._send("read", epoch, start)
        try:
            while (message := self._receive()) is not None:
                self._send("next")
                yield self._batch(message)
        except GeneratorExit:
            if self.pipe.closed:  # at interpreter exit
                return
            self._send("stop")
            while (message := self._receive()) is not None:
                self.released.append(message.number)
            raise

    def _start(self) -> None:
        context = helper_process_context(__name__)
        self.released = deque()  # a new one: batches of a process that was killed report to the old one
        self.attached = AttachedArrays()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.arguments))
        self.process.start()
        theirs.close()
        util.Finalize(self, self.pipe.close, exitpriority=10)  # before multiprocessing joins the other process at exit

    def _send(self, command: str, *arguments: int) -> None:
        """Send a command, and with it the numbers of the batches that were released."""
        released = [self.released.popleft() for _ in range(len(self.released))]
        try:
            self.pipe.send((command, arguments, released))
        except OSError as error:
            raise self._killed() from error

    def _receive(self) -> BatchMessage | None:
        """The next batch, or None after the last."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._killed() from error
        if isinstance(message, Exception):
            raise message
        return message

    def _killed(self) -> RuntimeError:
        self.process.join(5)
        code, self.process = self.process.exitcode, None
        return RuntimeError(
            f"the process that reads the cache ended with exit code {code}; if memory ran out, lower train.shuffle_window"
        )

    def _batch(self, message: BatchMessage) -> Batch:
        lease = _Lease(message.number, 1 + sum(map(len, message.features.values())), self.released)
        try:
            images = self._tensor(message.images, lease)
            features = {
                teacher: {kind: self._tensor(handle, lease) for kind, handle in kinds.items()}
                for teacher, kinds in message.features.items()
            }
        except OSError as error:  # killed after it had sent the message: its memory can no longer be opened
            raise self._killed() from error
        return Batch(message.keys, images, torch.from_numpy(message.labels), features, message.position)

    def _tensor(self, handle: ArrayHandle, lease: _Lease) -> Tensor:
        array = self.attached.array(handle).view()
        weakref.finalize(array, lease.release_array).atexit = False
        return torch.from_numpy(array)


class _Lease:
    """Counts the arrays of a batch that are still in use. Finalizers run in any thread at any point: no lock is safe."""

    def __init__(self, number: int, arrays: int, released: deque[int]) -> None:
        self.number, self.left, self.released = number, deque(range(arrays)), released

    def release_array(self) -> None:
        if self.left.pop() == 0:
            self.released.append(self.number)


def _serve(pipe: Connection, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
    init_helper_process()
    keep_freed_memory()
    _Server(pipe, CacheReader(*args, **settings)).run()


class _Server:
    def __init__(self, pipe: Connection, reader: CacheReader) -> None:
        self.pipe, self.reader = pipe, reader
        self.leased: dict[int, Batch] = {}
        self.sent = 0
        self.requests: SimpleQueue[tuple[int, ...] | None] = SimpleQueue()
        self.credits, self.stopped = threading.Semaphore(AHEAD), threading.Event()

    def run(self) -> None:
        """Serve until the other process is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        while request := self.requests.get():
            answer = None
            try:
                self._send_batches(*request)
            except Exception as error:  # noqa: BLE001  raised in the other process
                answer = error
            with suppress(OSError):
                self.pipe.send(answer)
        self.reader.close()

    def _listen(self) -> None:
        while True:
            try:
                command, arguments, released = self.pipe.recv()
            except (EOFError, OSError):
                self.requests.put(None)
                self.stopped.set()
                self.credits.release()
                return
            for number in released:
                del self.leased[number]
            if command == "read":
                # The release below adds the last credit.
                self.credits, self.stopped = threading.Semaphore(AHEAD - 1), threading.Event()
                self.requests.put(arguments)
            elif command == "stop":
                self.stopped.set()
            self.credits.release()

    def _send_batches(self, epoch: int, start: int) -> None:
        arrays, credits, stopped = self.reader.arrays, self.credits, self.stopped
        assert isinstance(arrays, SharedArrayPool)
        for batch in self.reader.batches(epoch, start):
            credits.acquire()
            if stopped.is_set():
                return
            self.leased[self.sent] = batch
            features = {
                teacher: {kind: arrays.handle(rows.numpy()) for kind, rows in kinds.items()}
                for teacher, kinds in batch.features.items()
            }
            images = arrays.handle(batch.images.numpy())
            self.pipe.send(BatchMessage(self.sent, batch.keys, batch.labels.numpy(), batch.position, images, features))
            self.sent += 1
