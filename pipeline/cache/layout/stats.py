"""Mean and covariance of features: accumulated in float64 over the batches of a shard, and merged over shards.

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
    """Count, mean [D] and scatter matrix [D, D] (sum of outer products of deviations) of vectors, in float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments over all but the last dimension of features [..., D]."""
        sums = MomentSums()
        sums.add(features)
        return sums.moments()

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of vectors together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance [D, D] of the population."""
        return self.scatter / self.count

    @property
    def std(self) -> np.ndarray:
        """Standard deviation [D] of the population."""
        return np.sqrt(np.diagonal(self.scatter) / self.count)


class MomentSums:
    """Accumulates moments on the device of the features, without synchronising it."""

    def __init__(self) -> None:
        self.count = 0
        self.pending: list[Tensor] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, features: Tensor) -> None:
        """Add vectors [..., D], on the device of the first ones."""
        flat = features.reshape(-1, features.shape[-1])
        self.pending.append(flat)
        self.count += len(flat)
        # Adding a product to the sum costs as much as some D vectors do, and a batch of summaries has far fewer.
        if sum(map(len, self.pending)) >= 4 * flat.shape[1]:
            self._sum_up()
        else:  # a view would keep the whole tensor alive, and memory that belongs to another stream
            self.pending[-1] = flat.clone()

    def moments(self) -> Moments:
        """Moments of all vectors added so far."""
        origin, total, scatter = self._sum_up()
        shift = total / self.count
        scatter = scatter.addr(shift, shift, alpha=-self.count)
        return Moments(self.count, (origin + shift).cpu().numpy(), scatter.cpu().numpy())

    def _sum_up(self) -> tuple[Tensor, Tensor, Tensor]:
        """An origin [D], and sums of the deviations from it and of their outer products."""
        import torch  # not at the top: indexing a source, which runs on every CPU of a cluster, does without

        if self.sums is None:
            origin = torch.cat(self.pending).mean(dim=0, dtype=torch.float64)
            self.sums = origin, torch.zeros_like(origin), torch.zeros_like(origin.outer(origin))
        origin, total, scatter = self.sums
        for part in torch.cat(self.pending).split(PIECE) if self.pending else ():
            deviations = part - origin  # in float64, as the mean is
            total += deviations.sum(dim=0)
            if deviations.is_cuda:
                scatter.addmm_(deviations.T, deviations)
            else:  # numpy sees that the product is symmetric and computes half of it; torch does not
                rows, sums = deviations.numpy(), scatter.numpy()
                sums += rows.T @ rows
        self.pending.clear()
        return self.sums


def merge_all(parts: Iterable[Mapping[str, Moments]]) -> Mapping[str, Moments]:
    """Moments of all parts together, by token type. Rounding depends on the order, so callers pass shards in order.

    Holds one part at a time: the moments of a large teacher take 13 MB per shard, and there are thousands of shards.
    """
    return reduce(lambda merged, part: {kind: merged[kind].merge(part[kind]) for kind in merged}, parts)


def dump_moments(moments: Mapping[str, Moments]) -> bytes:
    """Moments by token type as the bytes of an .npz file, with the upper triangle of the symmetric scatter matrix."""
    arrays: dict[str, object] = {}
    for kind, part in moments.items():
        triangle = part.scatter[_upper(len(part.mean))]
        arrays |= {f"{kind}_count": part.count, f"{kind}_mean": part.mean, f"{kind}_scatter": triangle}
    return dump_arrays(arrays)


def load_moments(data: bytes) -> dict[str, Moments]:
    """The inverse of :func:`dump_moments`; ValueError if there are none."""
    arrays = load_arrays(data)
    if not arrays:
        raise ValueError("it holds no statistics")
    return {
        kind: Moments(int(arrays[f"{kind}_count"]), arrays[f"{kind}_mean"], _symmetric(arrays[f"{kind}_scatter"]))
        for kind in kinds_of(arrays)
    }


def _symmetric(triangle: np.ndarray) -> np.ndarray:
    size = (int(np.sqrt(8 * len(triangle) + 1)) - 1) // 2
    matrix = np.zeros((size, size))
    matrix[_upper(size)] = triangle
    return matrix + np.triu(matrix, 1).T


def _upper(size: int) -> np.ndarray:
    """Mask of the upper triangle of a matrix; it takes a seventh of the time of indices."""
    return np.triu(np.ones((size, size), dtype=bool))
