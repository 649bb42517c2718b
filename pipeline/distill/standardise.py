"""Frozen standardisation of a teacher's features: statistics of the cache, never of a batch.

``mean_std`` divides every channel by its own standard deviation; ``phi_s`` rotates and divides all by one scale
(`pipeline/cache/layout/phi_s.py`). Exported heads need the inverse, to predict features in the teacher's own scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec, Projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.phi_s import PhiS, load_phi_s
from pipeline.cache.layout.stats import Moments, load_moments
from pipeline.cache.layout.target import inverse_deviations


class Standardiser(nn.Module):
    """Features [..., D] <-> their standardised form [..., D], in float32."""

    def scale_deviations(self, deviations: Tensor) -> Tensor:
        """`forward` of features whose mean is already subtracted."""
        raise NotImplementedError

    def inverse(self, features: Tensor) -> Tensor:
        """The inverse of `forward`."""
        raise NotImplementedError

    def fold(self, codec: FeatureCodec) -> FeatureCodec | None:
        """A decoder of projected features whose matrix also standardises them; None without a projection."""
        if codec.basis is None or codec.mean is None:
            return None
        basis = self.scale_deviations(codec.basis)
        projection = Projection(self(codec.mean), torch.ones_like(codec.mean), basis)
        return FeatureCodec(codec.scalar, codec.shape, projection, codec.by_channel)


class MeanStd(Standardiser):
    """(features - mean) / std per channel, both [D]; a constant channel becomes 0."""

    mean: Tensor
    std: Tensor
    factors: Tensor
    shift: Tensor

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(moments.mean).float())
        self.register_buffer("std", torch.from_numpy(moments.std).float())
        # Computed once, to save eight small kernels per step, teacher and kind of feature.
        self.register_buffer("factors", torch.empty_like(self.std), persistent=False)
        self.register_buffer("shift", torch.empty_like(self.mean), persistent=False)
        self._prepare()
        self.register_load_state_dict_post_hook(lambda module, _: module._prepare())

    def _prepare(self) -> None:
        self.factors.copy_(inverse_deviations(self.mean, self.std))
        self.shift.copy_(-self.mean * self.factors)

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.addcmul(self.shift, features, self.factors)  # one pass over the features

    def scale_deviations(self, deviations: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return deviations * self.factors

    def inverse(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return features * self.std + self.mean


class Rotation(Standardiser):
    """(features - mean) @ rotation.T / scale: PHI-S (Ranzinger et al. 2024, arXiv 2410.01680, section 3); 0 if the scale is 0."""

    mean: Tensor
    rotation: Tensor
    scale: Tensor

    def __init__(self, part: PhiS) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(part.mean).float())
        self.register_buffer("rotation", torch.from_numpy(part.rotation).float())
        self.register_buffer("scale", torch.tensor(part.scale))

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.scale_deviations(features - self.mean)

    def scale_deviations(self, deviations: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return deviations @ self.rotation.T * torch.where(self.scale > 0, 1 / self.scale, 0.0)

    def inverse(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return features * self.scale @ self.rotation + self.mean


def make_standardisers(dataset: Dataset, teacher: CachedTeacher, method: str) -> Mapping[str, Standardiser]:
    """By kind of feature, from a teacher's frozen statistics over a dataset; `method` is ``mean_std`` or ``phi_s``."""
    store = dataset.statistics(teacher.id)
    if method == "phi_s":
        return {kind: Rotation(part) for kind, part in load_phi_s(store.get("phi_s.npz")).items()}
    return {kind: MeanStd(moments) for kind, moments in load_moments(store.get("stats.npz")).items()}


def neutral_standardiser(method: str, width: int) -> Standardiser:
    """One that changes nothing, for features of this width, into which saved statistics are loaded."""
    if method == "phi_s":
        return Rotation(PhiS(np.zeros(width), np.eye(width), 1.0))
    return MeanStd(Moments(1, np.zeros(width), np.ones(width)))
