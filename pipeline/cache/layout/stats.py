"""Mean and variance of features: accumulated in float64 over the batches of a shard, and merged over shards.

The merge is the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979), section 2, with the outer product in place of the square. The data are first shifted by about
their mean, see the same authors' "Algorithms for Computing the Sample Variance" (1983).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.layout.arrays import dump_arrays, kinds_of, load_arrays

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 2**14
"""Vectors converted to float64 at a time; a whole batch of a large teacher's tokens would take gigabytes."""


@dataclass(frozen=True)
class Moments:
    """Count, mean [D] and scatter of vectors, in float64.

    The scatter is the sum of squared deviations [D], or that of their outer products [D, D].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Tensor, outer: bool = False) -> Moments:
        """Moments over all but the last dimension of features [..., D]."""
        sums = MomentSums(outer)
        sums.add(features)
        return sums.moments()

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of vectors together, which have scatters of one form."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = (np.outer(delta, delta) if self.scatter.ndim == 2 else delta**2) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance [D, D] of the population; the scatter must be [D, D]."""
        return self.scatter / self.count

    @property
    def std(self) -> np.ndarray:
        """Standard deviation [D] of the population."""
        squares = np.diagonal(self.scatter) if self.scatter.ndim == 2 else self.scatter
        return np.sqrt(squares / self.count)


class MomentSums:
    """Accumulates moments on the device of the features, without synchronising it.

    Args:
        outer: with the scatter matrix [D, D], which takes D times as long.
    """

    def __init__(self, outer: bool = False) -> None:
        self.count, self.outer = 0, outer
        self.pending: list[Tensor] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, features: Tensor) -> None:
        """Add vectors [..., D], on the device of the first ones."""
        flat = features.reshape(-1, features.shape[-1])
        self.pending.append(flat)
        self.count += len(flat)
        # Adding a product [D, D] to the sum costs as much as some D vectors do, and a batch of summaries has far fewer.
        if not self.outer or sum(map(len, self.pending)) >= 4 * flat.shape[1]:
            self._sum_up()
        else:  # a view would keep the whole tensor alive, and memory that belongs to another stream
            self.pending[-1] = flat.clone()

    def moments(self) -> Moments:
        """Moments of all vectors added so far."""
        origin, total, scatter = self._sum_up()
        shift = total / self.count
        between = shift.outer(shift) if self.outer else shift.square()
        scatter = scatter - self.count * between
        return Moments(self.count, (origin + shift).cpu().numpy(), scatter.cpu().numpy())

    def _sum_up(self) -> tuple[Tensor, Tensor, Tensor]:
        """An origin [D], and sums of the deviations from it and of their outer products."""
        import torch  # not at the top: indexing a source, which runs on every CPU of a cluster, does without

        if self.sums is None:
            origin = torch.cat(self.pending).mean(dim=0, dtype=torch.float64)
            zeros = torch.zeros_like(origin)
            self.sums = origin, zeros, zeros.outer(zeros) if self.outer else zeros.clone()
        origin, total, scatter = self.sums
        for part in torch.cat(self.pending).split(PIECE) if self.pending else ():
            deviations = part - origin  # in float64, as the mean is
            total += deviations.sum(dim=0)
            if not self.outer:
                scatter += deviations.square().sum(dim=0)
            elif deviations.is_cuda:
                scatter.addmm_(deviations.T, deviations)
            else:  # numpy sees that the product is symmetric and computes half of it; torch does not
                rows, sums = deviations.numpy(), scatter.numpy()
                sums += rows.T @ rows
        self.pending.clear()
        return self.sums


def merge_all(parts: Iterable[Mapping[str, Moments]]) -> Mapping[str, Moments]:
    """Moments of all parts together, by token type. Rounding depends on the order, so callers pass parts in order."""
    return reduce(lambda merged, part: {kind: merged[kind].merge(part[kind]) for kind in merged}, parts)


def dump_moments(moments: Mapping[str, Moments]) -> bytes:
    """Count, mean and deviation by token type as the bytes of an .npz file.

    In float32, as the features themselves: shards differ in their means by far more than its rounding. The sum of the squares
    would leave its range before the features do, so their root is kept.
    """
    arrays: dict[str, object] = {}
    for kind, part in moments.items():
        arrays |= {f"{kind}_count": part.count}
        arrays |= {f"{kind}_mean": part.mean.astype(np.float32), f"{kind}_std": part.std.astype(np.float32)}
    return dump_arrays(arrays)


def load_moments(data: bytes) -> dict[str, Moments]:
    """The inverse of :func:`dump_moments`; ValueError if there are none."""
    arrays = load_arrays(data)
    if not arrays:
        raise ValueError("it holds no statistics")
    return {kind: _load(arrays, kind) for kind in kinds_of(arrays)}


def _load(arrays: Mapping[str, np.ndarray], kind: str) -> Moments:
    count, mean = int(arrays[f"{kind}_count"]), arrays[f"{kind}_mean"].astype(np.float64)
    return Moments(count, mean, arrays[f"{kind}_std"].astype(np.float64) ** 2 * count)
