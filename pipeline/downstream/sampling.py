"""Which images make which batch, and their preparation in other processes: functions of the seed alone.

Batch `n` of a run holds the same images with the same augmentation however often the run was interrupted, however many
workers share it (each takes its part of the global batch), and however many processes prepare it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import UserError


class Draw(NamedTuple):
    """One image of a batch: its place in the whole run, which seeds its augmentation, and its row in the data."""

    number: int
    row: int


class Sampler:
    """The order of a run: shuffled passes over the rows, one after the other, cut into global batches.

    Args:
        count: rows.
        batch_size: images per step over all workers.
        seed: of the order.
        whole_passes: whether each pass drops the rows that do not fill a batch, so that a pass is an epoch; otherwise passes
            follow each other without a gap.
        block: neighbouring rows that are kept together, where reading one reads the others too.
        window: rows that are shuffled together after the shuffle of blocks.
        rank, world: number of this worker, and of all; each draws its part of every batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        whole_passes: bool = True,
        block: int = 1,
        window: int = 1024,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed, self.block, self.window = count, batch_size, seed, block, window
        self.rank, self.world = rank, world
        self.used = count // batch_size * batch_size if whole_passes else count
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, number: int) -> list[Draw]:
        """This rank's part of global batch `number`."""
        part = self.batch_size // self.world
        first = number * self.batch_size + self.rank * part
        return [Draw(n, int(self._order(n // self.used)[n % self.used])) for n in range(first, first + part)]

    def _shuffle(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number])
        if self.block == 1:
            return rng.permutation(self.count)
        blocks = np.array_split(np.arange(self.count), -(-self.count // self.block))
        rows = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
        windows = np.split(rows, range(self.window, self.count, self.window))
        return np.concatenate([rng.permutation(window) for window in windows])


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
    """Item `i` is `make` of item `i` of the list."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.make, self.items = make, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(self.items[index])
        except UserError as error:
            # Returned, not raised: the loader would wrap its text into a traceback.
            return error


def prepare(make: Callable[[Any], Any], items: Sequence[Any], processes: int | None) -> Iterator[Any]:
    """`make` of every item, in order, in other processes (None: CPUs of this process less one; 0: in this one).

    Raises:
        UserError: as `make` raised it.
    """
    count = max(1, torch.get_num_threads() - 1) if processes is None else processes
    loader = DataLoader(
        _Prepared(make, items),
        batch_size=None,
        num_workers=count,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one, and a resumed run draws once more
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
