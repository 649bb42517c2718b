"""Per-channel statistics of features: accumulated in float64 shard by shard, and merged.

The merge is the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979), section 2.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean [D] and sum of squared deviations [D] of vectors, in float64."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments over all but the last dimension of features [..., D]."""
        flat = features.reshape(-1, features.shape[-1]).to(torch.float64)
        mean = flat.mean(dim=0)
        m2 = (flat - mean).square_().sum(dim=0)
        return cls(len(flat), mean.cpu().numpy(), m2.cpu().numpy())

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of vectors together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation [D] of the population."""
        return np.sqrt(self.m2 / self.count)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together; the given order decides the last bit, so callers give shards in order."""
    return reduce(Moments.merge, parts)


def dump_moments(moments: dict[str, Moments]) -> bytes:
    """Moments by token type (``summary``, ``patches``) as the bytes of an .npz file."""
    buffer = io.BytesIO()
    arrays = {f"{kind}_{name}": getattr(m, name) for kind, m in moments.items() for name in ("count", "mean", "m2")}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def load_moments(data: bytes) -> dict[str, Moments]:
    """The inverse of :func:`dump_moments`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        kinds = sorted({name.rsplit("_", 1)[0] for name in arrays.files})
        return {k: Moments(int(arrays[f"{k}_count"]), arrays[f"{k}_mean"], arrays[f"{k}_m2"]) for k in kinds}
