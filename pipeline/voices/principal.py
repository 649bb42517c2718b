"""Patches in colours: the first principal components, with one basis for all images (Oquab et al. 2023)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS = 256
CUT = 0.01
"""Share of the values that are cut off at each end of a colour."""


class Coloured(NamedTuple):
    """Colours [N, h, w, 3] in [0, 1], and the foreground [N, h, w], whose components they are; the background is black."""

    colours: Tensor
    foreground: Tensor


def principal_colours(maps: Tensor) -> Coloured:
    """Colour the patches of maps [N, h, w, D] by their first three components, the foreground first.

    The first component of all patches separates foreground and background, at the threshold of Otsu (1979); the background
    is the side that has more of the images' borders. The colours are the components of the foreground alone: equal colours
    mean alike patches, in all images.
    """
    tokens = maps.flatten(0, 2).double()
    first = _project(tokens, tokens, 1)[:, 0]
    foreground = (first > otsu(first)).view(maps.shape[:3])
    if _border(foreground) > 0.5:
        foreground = ~foreground
    chosen = foreground.flatten()
    if int(chosen.sum()) < 4:  # a basis needs more patches than components
        chosen = torch.ones_like(chosen)
    components = _project(tokens[chosen], tokens[chosen], 3)
    # torch.quantile takes at most 2^24 numbers.
    low, high = torch.from_numpy(np.quantile(components.numpy(), (CUT, 1 - CUT), axis=0))
    colours = torch.zeros(len(tokens), 3, dtype=torch.float64)
    colours[chosen] = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return Coloured(colours.view(*maps.shape[:3], 3).float(), chosen.view(maps.shape[:3]))


def _project(tokens: Tensor, basis_of: Tensor, count: int) -> Tensor:
    """The first components [M, count] of tokens [M, D] in the principal basis of others; fewer channels are padded by zeros."""
    mean = basis_of.mean(dim=0)
    centred = basis_of - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors.flip(1)[:, :count]
    # The sign of an eigenvector is arbitrary: its largest entry is positive.
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    found = (tokens - mean) @ basis
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def otsu(values: Tensor) -> float:
    """The threshold between two classes of values [M] that has the largest variance between them (Otsu 1979)."""
    low, high = values.min().item(), values.max().item()
    counts = torch.histc(values, BINS, low, high) if high > low else torch.zeros(BINS, dtype=values.dtype)
    if not counts.any():
        return low
    middles = low + (torch.arange(BINS, dtype=values.dtype) + 0.5) * (high - low) / BINS
    below, mass = counts.cumsum(0), (counts * middles).cumsum(0)
    above, total = below[-1] - below, mass[-1]
    between = below * above * (mass / below.clamp_min(1) - (total - mass) / above.clamp_min(1)) ** 2
    best = (between == between.max()).nonzero().flatten()  # an empty stretch has one value: take its middle
    return low + (best.double().mean().item() + 1) * (high - low) / BINS


def _border(foreground: Tensor) -> float:
    """Share of the border that is foreground."""
    edge = torch.ones(foreground.shape[1:], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return foreground[:, edge].double().mean().item()
