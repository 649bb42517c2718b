"""Batches of several input sizes in one step: a share of the samples at each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.cache.read.order import ShuffleQuality
from pipeline.cache.read.reader import Batch


class Reader(Protocol):
    """What training needs of a reader of one input size."""

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well an epoch is shuffled."""


@dataclass(frozen=True)
class MixedBatch:
    """The input of one training step, one batch for each input size."""

    parts: list[Batch]

    @property
    def keys(self) -> list[str]:
        """Sample ids of all parts."""
        return [key for part in self.parts for key in part.keys]


def parts_of(batch: Batch | MixedBatch) -> list[Batch]:
    """The batch of each input size."""
    return batch.parts if isinstance(batch, MixedBatch) else [batch]


def divide_batch(size: int, shares: Sequence[float]) -> list[int]:
    """Samples of each input size in a batch of `size`: those of `shares`, rounded, after the rest."""
    others = [round(share * size) for share in shares]
    return [size - sum(others), *others]


class HasBatches(Protocol):
    """A reader of one input size or of several."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch | MixedBatch]:
        """The batches of an epoch from number `start` on."""


class MixedReader:
    """Reads every input size with a reader of its own, and joins their batches.

    Each reader goes through all images again and again, at its own pace, so that every image is seen equally often at each size.
    An epoch has as many samples as the first reader's.

    Args:
        readers: the batches of one step.
        sizes: samples in a batch of each.
    """

    def __init__(self, readers: Sequence[Reader], sizes: Sequence[int]) -> None:
        self.readers, self.sizes = readers, sizes

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        return max(1, self.readers[0].steps(epoch) * self.sizes[0] // sum(self.sizes))

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """That of the first reader."""
        return self.readers[0].shuffle_quality(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[MixedBatch]:
        """The batches of an epoch from number `start` on; the two numbers determine them."""
        step = sum(map(self.steps, range(epoch))) + start
        streams = [_endless(reader, step) for reader in self.readers]
        for number in range(start, self.steps(epoch)):
            yield MixedBatch([replace(next(stream), position=(epoch, number)) for stream in streams])


def first_batch(reader: HasBatches) -> Batch:
    """The first batch of the first epoch, of the first input size."""
    return parts_of(next(reader.batches(0)))[0]


def _endless(reader: Reader, step: int) -> Iterator[Batch]:
    """A reader's batches, epoch after epoch, from this step of all on."""
    epoch = 0
    while step >= (length := reader.steps(epoch)):
        epoch, step = epoch + 1, step - length
    while True:
        yield from reader.batches(epoch, step)
        epoch, step = epoch + 1, 0
