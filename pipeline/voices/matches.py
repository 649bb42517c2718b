"""The same thing in another picture: mutual nearest patches, and the transfer of points.

Points are (x, y) in shares of the image's width and height, from its left upper corner.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FINE = 4
"""Positions per patch and side among which a point is looked for, interpolated between the cosines of patches."""


class Matches(NamedTuple):
    """Pairs of points [M, 2] in two images, and their cosines [M], the largest first."""

    first: Tensor
    second: Tensor
    cosines: Tensor


def mutual_nearest(first: Tensor, second: Tensor) -> Matches:
    """Patches of two maps [h, w, D] and [h', w', D] that are each other's nearest by cosine."""
    one, other = (F.normalize(part.flatten(0, 1), dim=1) for part in (first, second))
    cosines = one @ other.T
    there, back = cosines.argmax(dim=1), cosines.argmax(dim=0)
    mutual = (back[there] == torch.arange(len(one))).nonzero().flatten()
    values, order = cosines[mutual, there[mutual]].sort(descending=True, stable=True)
    mutual = mutual[order]
    return Matches(_centres(mutual, first.shape), _centres(there[mutual], second.shape), values)


def _centres(positions: Tensor, shape: torch.Size) -> Tensor:
    """The centres [M, 2] of the patches with these row-major numbers on a grid (h, w, ...)."""
    height, width = shape[:2]
    columns, rows = positions % width, positions // width
    return torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], dim=1)


def transfer(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    """The points [P, 2] of the second image that are most like points [P, 2] of the first.

    The feature at a point is interpolated between patches; its cosines to the patches of the second map are interpolated to a
    grid `FINE` times as fine, whose largest value is the answer.
    """
    if not len(points):
        return points.clone()
    grid = (2 * points - 1).to(first)[None, None]
    wanted = F.grid_sample(first.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False)[0, :, 0]
    cosines = F.normalize(second, dim=2) @ F.normalize(wanted, dim=0)  # [h', w', P]
    height, width = (FINE * side for side in second.shape[:2])
    fine = F.interpolate(cosines.permute(2, 0, 1)[None], (height, width), mode="bicubic", align_corners=False)[0]
    return _centres(fine.flatten(1).argmax(dim=1), torch.Size((height, width)))
