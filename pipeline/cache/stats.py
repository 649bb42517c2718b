"""Mean and covariance of features: accumulated in float64 shard by shard, and merged.

The merge is the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979), section 2, with the outer product in place of the square.

torch is imported where features are summed up alone: indexing a source, which runs on every CPU of a cluster, needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.arrays import dump_arrays, kinds_of, load_arrays

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
        import torch

        flat = features.reshape(-1, features.shape[-1])
        mean = flat.mean(dim=0, dtype=torch.float64)
        scatter = sum(_scatter(part - mean) for part in flat.split(PIECE))  # in float64, as the mean is
        return cls(len(flat), mean.cpu().numpy(), torch.as_tensor(scatter).cpu().numpy())

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


def _scatter(deviations: Tensor) -> Tensor | np.ndarray:
    # numpy sees that the product is symmetric and computes half of it; torch does not.
    rows = deviations if deviations.is_cuda else deviations.numpy()
    return rows.T @ rows


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
        triangle = part.scatter[np.triu_indices(len(part.mean))]
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
    matrix[np.triu_indices(size)] = triangle
    return matrix + np.triu(matrix, 1).T
