"""Features drawn for the tests of codecs and projections."""

import numpy as np
import torch
from torch import Tensor


def low_rank(images=40, grid=4, dim=48, rank=6, noise=0.02, seed=0) -> Tensor:
    """Patches [N, h, w, D] near a plane of `rank` dimensions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(rank, dim, generator=torch.Generator().manual_seed(99))
    values = torch.randn(images, grid, grid, rank, generator=generator) @ plane
    return values + noise * torch.randn(images, grid, grid, dim, generator=generator) + 1


def decaying(images=96, grid=6, dim=64, power=1.5, spread=1.0, seed=0) -> Tensor:
    """Patches [N, h, w, D] whose correlation has the spectrum i**-power; means and deviations differ between the channels."""
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(7)  # the same network for every seed
    turn = np.linalg.qr(shape.standard_normal((dim, dim)))[0]
    spectrum = np.arange(1, dim + 1.0) ** -power
    deviations, means = np.exp(spread * shape.standard_normal(dim)), 3 * shape.standard_normal(dim)
    drawn = rng.standard_normal((images * grid * grid, dim)) * np.sqrt(dim * spectrum / spectrum.sum()) @ turn.T
    return torch.from_numpy((means + deviations * drawn).reshape(images, grid, grid, dim)).float()
