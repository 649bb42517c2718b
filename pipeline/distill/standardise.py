"""Frozen standardisation of a teacher's features: statistics of the cache, never of a batch.

``mean_std`` divides every channel by its own standard deviation; ``phi_s`` rotates and divides all by one scale
(`pipeline/cache/phi_s.py`). Either can be undone, which heads that are kept beside a student need.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cache.codec import Projection, TokenCodec
from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import CachedTeacher
from pipeline.cache.phi_s import PhiS, load_phi_s
from pipeline.cache.stats import Moments, load_moments


class Standardiser(nn.Module):
    """Features [..., D] <-> their standardised form [..., D], in float32."""

    def undo(self, features: Tensor) -> Tensor:
        """The inverse of `forward`."""
        raise NotImplementedError

    def fold(self, tokens: TokenCodec) -> TokenCodec | None:
        """A decoder whose features are standardised already, where that saves anything; else None."""
        return None


class MeanStd(Standardiser):
    """(features - mean) / std per channel; a channel that never varied says nothing, and becomes 0.

    Args:
        mean, std: [D].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("std", torch.from_numpy(std).float())

    @classmethod
    def of(cls, moments: Moments) -> MeanStd:
        """From the statistics of the features."""
        return cls(moments.mean, moments.std)

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        alive = self.std > 1e-6 * self.std.max()
        tiny = torch.finfo(self.std.dtype).tiny
        return torch.where(alive, (features - self.mean) / self.std.clamp_min(tiny), 0.0)

    def undo(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return features * self.std + self.mean


class Rotation(Standardiser):
    """(features - mean) @ rotation.T / scale: PHI-S (Ranzinger et al. 2024, arXiv 2410.01680, section 3).

    Args:
        part: of the cache.
    """

    mean: Tensor
    rotation: Tensor
    scale: Tensor

    def __init__(self, part: PhiS) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(part.mean).float())
        self.register_buffer("rotation", torch.from_numpy(part.rotation).float())
        # Features that never vary have no scale; they become 0.
        self.register_buffer("scale", torch.tensor(part.scale or float("inf")))

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return (features - self.mean) @ self.rotation.T / self.scale

    def fold(self, tokens: TokenCodec) -> TokenCodec | None:
        """Of projected features: the decoder's own matrix takes the rotation, which is as dear as the projection itself."""
        if tokens.basis is None or tokens.mean is None:
            return None
        basis = tokens.basis @ self.rotation.T / self.scale
        return TokenCodec(tokens.scalar, tokens.shape, Projection(self(tokens.mean), basis), tokens.by_channel)

    def undo(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        scale = torch.where(self.scale.isinf(), 0.0, self.scale)
        return features * scale @ self.rotation + self.mean


def make_standardisers(dataset: Dataset, teacher: CachedTeacher, method: str) -> Mapping[str, Standardiser]:
    """By token type, from a teacher's frozen statistics over a dataset.

    Args:
        method: ``mean_std`` or ``phi_s``.
    """
    store = dataset.teacher(teacher.id).store
    if method == "phi_s":
        return {kind: Rotation(part) for kind, part in load_phi_s(store.get("phi_s.npz")).items()}
    return {kind: MeanStd.of(moments) for kind, moments in load_moments(store.get("stats.npz")).items()}
