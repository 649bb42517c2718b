"""The order in which a training worker reads an epoch: shuffled row groups, then shuffled rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.cache.layout.shards import RowGroup
from pipeline.errors import UserError


def check_per_step(per_step: int, views: int, batch_size: int) -> None:
    """Raise UserError unless groups of `per_step` views divide an image's `views` and the rows of a worker's step."""
    if views % per_step or batch_size % per_step:
        raise UserError(
            f"views.per_step={per_step} must divide the {views} views of an image (views.crops) and the {batch_size} "
            "images of a worker's step (train.batch_size, train.workers)"
        )


@dataclass(frozen=True)
class ShuffleQuality:
    """How close an epoch's order is to a full shuffle.

    Attributes:
        rank_correlation: Spearman correlation of a row's stored and training positions, in [-1, 1]; near 0 for a full
            shuffle.
        same_group: share of the pairs of rows in a batch that come from one row group.
        same_group_full: expected value of `same_group` for a full shuffle.
    """

    rank_correlation: float
    same_group: float
    same_group_full: float

    def __str__(self) -> str:
        return (
            f"rank correlation {self.rank_correlation:+.3f}, {self.same_group:.2%} of the pairs in a batch from one row "
            f"group, {self.same_group_full:.2%} in a full shuffle"
        )


class OrderedRows(NamedTuple):
    """A rank's rows of an epoch, in training order.

    Attributes:
        groups: in reading order.
        rows: [R, 2] int64, index into `groups` and row in that group.
        window_start: [R] int64, index of the first row group in the row's shuffle window.
    """

    groups: list[RowGroup]
    rows: np.ndarray
    window_start: np.ndarray


@dataclass(frozen=True)
class EpochOrder:
    """The order of every epoch on one rank, a function of these values and the epoch's number alone.

    Row groups are permuted over the whole dataset and dealt to the ranks. Each rank then permutes rows within windows of
    successive row groups.

    Attributes:
        groups: all row groups of the dataset.
        batch_size: rows per batch on this rank.
        window: rows that are shuffled together.
        rank, world: this training worker's number and the number of workers.
        per_step, views: views of an image in one batch (in adjacent rows), and in the cache.
    """

    groups: Sequence[RowGroup]
    batch_size: int
    seed: int
    window: int
    rank: int
    world: int
    per_step: int
    views: int

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, equal on every rank; rows that do not fill a batch are dropped from that epoch."""
        order = self._permuted_groups(epoch)
        rows = [sum(self.groups[i].rows for i in order[rank :: self.world]) for rank in range(self.world)]
        return min(rows) // self.batch_size

    def rows(self, epoch: int) -> OrderedRows:
        """This rank's rows of an epoch."""
        groups = [self.groups[i] for i in self._permuted_groups(epoch)[self.rank :: self.world]]
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        rows, starts = [], []
        for window in self._windows(groups):
            sizes = [groups[i].rows for i in window]
            within = np.concatenate([np.arange(size) for size in sizes])
            rows.append(self._shuffle(np.stack([np.repeat(window, sizes), within], axis=1), rng))
            starts.append(np.full(len(within), window.start))
        return OrderedRows(groups, np.concatenate(rows), np.concatenate(starts))

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well this rank's rows of an epoch are shuffled, from the order alone."""
        order = self._permuted_groups(epoch)[self.rank :: self.world]
        rows = self.rows(epoch).rows
        sizes = np.array([group.rows for group in self.groups])
        stored = (sizes.cumsum() - sizes)[order][rows[:, 0]] + rows[:, 1]
        batches = rows[: len(rows) // self.batch_size * self.batch_size, 0].reshape(-1, self.batch_size)
        correlation = float(np.corrcoef(stored.argsort().argsort(), np.arange(len(stored)))[0, 1])
        within = float(np.mean([_same_group_pairs(np.unique(batch, return_counts=True)[1]) for batch in batches]))
        return ShuffleQuality(correlation, within, _same_group_pairs(sizes[order]))

    def _permuted_groups(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def _windows(self, groups: Sequence[RowGroup]) -> Iterator[range]:
        """Indices of the row groups in each shuffle window: as many as fit, at least one."""
        first = 0
        while first < len(groups):
            last, rows = first + 1, groups[first].rows
            while last < len(groups) and rows + groups[last].rows <= self.window:
                rows += groups[last].rows
                last += 1
            yield range(first, last)
            first = last

    def _shuffle(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Permute a window's rows; an image's views are first split at random into groups of `per_step` that stay together."""
        if self.per_step == 1:
            return rng.permutation(rows)
        views = rng.permuted(rows[:, 1].reshape(-1, self.views), axis=1).reshape(-1)
        together = np.stack([rows[:, 0], views], axis=1).reshape(-1, self.per_step, 2)
        return rng.permutation(together).reshape(-1, 2)


def _same_group_pairs(sizes: np.ndarray) -> float:
    """Share of the pairs of rows that come from one group, given the groups' sizes."""
    total = sizes.sum()
    return float((sizes * (sizes - 1)).sum() / max(1, total * (total - 1)))
