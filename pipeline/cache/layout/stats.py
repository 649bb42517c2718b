"""Mean and covariance of features: summed up in float64 batch by batch of a shard, and merged over the shards.

The merge is the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979), section 2, with the outer product in place of the square. The sums are of data that are shifted by
about their mean: the same authors' "Algorithms for Computing the Sample Variance" (1983).

torch is imported where features are summed up alone: indexing a source, which runs on every CPU of a cluster, needs none.
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
"""Vectors that are taken to float64 at once: of a batch of a large teacher's tokens that would be gigabytes."""


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
    """Moments in the making. They stay on the device of the features, where adding a batch waits for nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting: list[Tensor] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, features: Tensor) -> None:
        """Add vectors [..., D], on the device of the first ones."""
        flat = features.reshape(-1, features.shape[-1])
        self.waiting.append(flat)
        self.count += len(flat)
        # Taking a product to the sum costs as much as some D vectors do: a batch of summaries has far fewer.
        if sum(map(len, self.waiting)) >= 4 * flat.shape[1]:
            self._sum_up()
        else:  # what waits must not hold the tensor that it is a part of, nor memory that another stream gave
            self.waiting[-1] = flat.clone()

    def moments(self) -> Moments:
        """Those of all vectors that were added."""
        origin, total, scatter = self._sum_up()
        shift = total / self.count
        scatter = scatter.addr(shift, shift, alpha=-self.count)
        return Moments(self.count, (origin + shift).cpu().numpy(), scatter.cpu().numpy())

    def _sum_up(self) -> tuple[Tensor, Tensor, Tensor]:
        """An origin [D], and sums of the deviations from it and of their outer products."""
        import torch

        if self.sums is None:
            origin = torch.cat(self.waiting).mean(dim=0, dtype=torch.float64)
            self.sums = origin, torch.zeros_like(origin), torch.zeros_like(origin.outer(origin))
        origin, total, scatter = self.sums
        for part in torch.cat(self.waiting).split(PIECE) if self.waiting else ():
            deviations = part - origin  # in float64, as the mean is
            total += deviations.sum(dim=0)
            if deviations.is_cuda:
                scatter.addmm_(deviations.T, deviations)
            else:  # numpy sees that the product is symmetric and computes half of it; torch does not
                rows, sums = deviations.numpy(), scatter.numpy()
                sums += rows.T @ rows
        self.waiting.clear()
        return self.sums


def merge_all(parts: Iterable[Mapping[str, Moments]]) -> Mapping[str, Moments]:
    """Moments by token type of all parts together; the given order decides the last bit, so callers give shards in order.

    One part is held at a time: a shard's of a large teacher take 13 MB, and there are thousands of shards.
    """
    return reduce(lambda merged, part: {kind: merged[kind].merge(part[kind]) for kind in merged}, parts)


def dump_moments(moments: Mapping[str, Moments]) -> bytes:
    """Moments by token type (``summary``, ``patches``) as the bytes of an .npz file.

    Of the scatter matrix, which is symmetric, the upper triangle is kept.
    """
    arrays: dict[str, object] = {}
    for kind, part in moments.items():
        triangle = part.scatter[_upper(len(part.mean))]
        arrays |= {f"{kind}_count": part.count, f"{kind}_mean": part.mean, f"{kind}_scatter": triangle}
    return dump_arrays(arrays)


def load_moments(data: bytes) -> dict[str, Moments]:
    """The inverse of :func:`dump_moments`.

    Raises:
        ValueError: where the file holds none.
    """
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
    """Where the upper triangle of a matrix is; as a mask, which takes a seventh of the time of indices."""
    return np.triu(np.ones((size, size), dtype=bool))
