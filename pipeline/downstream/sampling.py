"""Which images make which batch, and their preparation in other processes: functions of the seed alone.

Batch `n` of a run holds the same images with the same augmentation however often the run was interrupted, however many
workers share it (each takes its part of the global batch), and however many processes prepare it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import UserError


class Draw(NamedTuple):
    """One image of a batch: its number in the whole run, which seeds its augmentation, and its row in the data."""

    number: int
    row: int


@dataclass(frozen=True)
class Sampler:
    """The order of a run: shuffled passes over the rows, one after the other, cut into global batches.

    Attributes:
        count: number of rows.
        batch_size: images per step over all workers.
        whole_passes: whether each pass drops the rows that do not fill a batch, so that a pass is an epoch; otherwise passes
            follow each other without a gap.
        block: neighbouring rows that stay together, because reading one reads the others too.
        window: rows that are shuffled together after the blocks are shuffled.
        rank, world: number of this worker, and of all; each draws its part of every batch.
    """

    count: int
    batch_size: int
    seed: int
    _: KW_ONLY
    whole_passes: bool = True
    block: int = 1
    window: int = 1024
    rank: int = 0
    world: int = 1

    def batch(self, number: int) -> list[Draw]:
        """This rank's part of global batch `number`."""
        part = self.batch_size // self.world
        first = number * self.batch_size + self.rank * part
        used = self.count // self.batch_size * self.batch_size if self.whole_passes else self.count
        return [Draw(n, int(self._order(n // used)[n % used])) for n in range(first, first + part)]

    def _order(self, number: int) -> np.ndarray:
        return _shuffle((self.seed, number), self.count, self.block, self.window)


@lru_cache(maxsize=2)
def _shuffle(entropy: tuple[int, ...], count: int, block: int, window: int) -> np.ndarray:
    rng = np.random.default_rng(entropy)
    if block == 1:
        return rng.permutation(count)
    blocks = np.array_split(np.arange(count), -(-count // block))
    rows = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return np.concatenate([rng.permutation(part) for part in np.split(rows, range(window, count, window))])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators, which timm and torchvision draw from; then put them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Prepared(Dataset[Any]):
    """Item `i` is `make(items[i])`."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.make, self.items = make, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(self.items[index])
        except UserError as error:
            return error  # a raised one would reach the caller with a traceback in its message


def prepare(make: Callable[[Any], Any], items: Sequence[Any], processes: int | None) -> Iterator[Any]:
    """Yield `make(item)` for every item, in order, from other processes (None: one per CPU but one; 0: this process)."""
    count = max(1, torch.get_num_threads() - 1) if processes is None else processes
    loader = DataLoader(
        _Prepared(make, items),
        batch_size=None,
        num_workers=count,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the global one would advance, and a resumed run would differ
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
