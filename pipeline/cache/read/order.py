"""The order in which a training worker reads an epoch: shuffled row groups, then shuffled rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.cache.layout.shards import RowGroup
from pipeline.errors import UserError

JUDGED = 2**20
"""Rows of which the quality of a shuffle is judged."""


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


class Window(NamedTuple):
    """Rows of a rank that are shuffled together.

    Attributes:
        first: number of the first row, in training order on this rank.
        groups: the row groups, in reading order.
        rows: [R, 2] int64 in training order, index into `groups` and row in that group.
    """

    first: int
    groups: list[RowGroup]
    rows: np.ndarray


@dataclass(frozen=True)
class EpochOrder:
    """The order of every epoch on one rank, a function of these values and the epoch's number alone.

    Row groups are permuted over the whole dataset and dealt to the ranks. Each rank then permutes rows within windows of
    successive row groups, which are made one by one: no more than the row groups of the dataset is held.

    Attributes:
        groups: [G, 4] int64, all row groups of the dataset: the fields of `RowGroup`.
        batch_size: rows per batch on this rank.
        window: rows that are shuffled together.
        rank, world: this training worker's number and the number of workers.
        per_step, views: views of an image in one batch (in adjacent rows), and in the cache.
    """

    groups: np.ndarray
    batch_size: int
    seed: int
    window: int
    rank: int
    world: int
    per_step: int
    views: int

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, equal on every rank; rows that do not fill a batch are dropped from that epoch."""
        rows = self.groups[self._permutation(epoch), 3]
        return int(min(rows[rank :: self.world].sum() for rank in range(self.world))) // self.batch_size

    def windows(self, epoch: int, row: int = 0) -> Iterator[Window]:
        """This rank's windows of an epoch, from the one that holds its row number `row` on."""
        groups = self.groups[self._permutation(epoch)[self.rank :: self.world]]
        ends = np.concatenate([[0], groups[:, 3].cumsum()])
        first = number = 0
        while first < len(groups):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] + self.window, side="right")) - 1)
            if ends[last] > row:
                rng = np.random.default_rng([self.seed, epoch, self.rank, number])
                yield Window(
                    int(ends[first]),
                    [RowGroup(*group) for group in groups[first:last].tolist()],
                    self._shuffled(groups[first:last, 3], rng),
                )
            first, number = last, number + 1

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well this rank's rows of an epoch are shuffled, from the order of the first `JUDGED` alone."""
        order = self._permutation(epoch)[self.rank :: self.world]
        starts = self.groups[:, 3].cumsum() - self.groups[:, 3]
        number, stored, owners = 0, [], []
        for window in self.windows(epoch):
            mine = order[number : number + len(window.groups)][window.rows[:, 0]]
            number += len(window.groups)
            stored.append(starts[mine] + window.rows[:, 1])
            owners.append(mine)
            if window.first > JUDGED:
                break
        positions, groups = np.concatenate(stored), np.concatenate(owners)
        batches = groups[: len(groups) // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        correlation = float(np.corrcoef(positions.argsort().argsort(), np.arange(len(positions)))[0, 1])
        within = float(np.mean([_same_group_pairs(np.unique(batch, return_counts=True)[1]) for batch in batches]))
        return ShuffleQuality(correlation, within, _same_group_pairs(self.groups[order, 3]))

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def _shuffled(self, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The rows of a window, permuted; groups of `per_step` of an image's views, drawn at random, stay together."""
        within = np.concatenate([np.arange(size) for size in sizes])
        rows = np.stack([np.repeat(np.arange(len(sizes)), sizes), within], axis=1)
        if self.per_step == 1:
            return rng.permutation(rows)
        views = rng.permuted(rows[:, 1].reshape(-1, self.views), axis=1).reshape(-1)
        together = np.stack([rows[:, 0], views], axis=1).reshape(-1, self.per_step, 2)
        return rng.permutation(together).reshape(-1, 2)


def _same_group_pairs(sizes: np.ndarray) -> float:
    """Share of the pairs of rows that come from one group, given the groups' sizes."""
    total = int(sizes.sum())
    return float((sizes * (sizes - 1)).sum() / max(1, total * (total - 1)))
