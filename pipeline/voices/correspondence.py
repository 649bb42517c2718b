"""The percentage of correct key points (PCK; Yang and Ramanan 2013), as on SPair-71k (Min et al. 2019)."""

from collections.abc import Iterable

import torch

from pipeline.errors import UserError
from pipeline.predict.predictor import Predictor
from pipeline.voices.matches import transfer
from pipeline.voices.pairs import Pair

SHARES = (0.05, 0.1, 0.15)
"""Largest distances that count as correct, as shares of the larger side of the object in the second image."""


def key_point_accuracy(predictor: Predictor, pairs: Iterable[Pair]) -> dict[str, float]:
    """PCK in percent: `pck_0.1`, ..., the mean over pairs of the share of their points, and `points_0.1`, ... of all points.

    Args:
        predictor: its `features` are maps.

    Raises:
        UserError: if no pair has key points.
    """
    shares = torch.tensor(SHARES)
    rows = []
    for pair in pairs:
        if not len(pair.points):
            continue
        first, second = predictor.features([pair.first, pair.second])
        start, end = torch.from_numpy(pair.points).unbind(dim=1)
        sizes = [torch.tensor(image.size, dtype=torch.float32) for image in (pair.first, pair.second)]
        found = transfer(first, second, start / sizes[0]) * sizes[1]
        distances = (found - end).norm(dim=1) / pair.extent
        rows.append(distances[:, None] <= shares)
    if not rows:
        raise UserError("correspondence.pairs: no pair has key points")
    by_image = torch.stack([row.float().mean(dim=0) for row in rows]).mean(dim=0)
    by_point = torch.cat(rows).float().mean(dim=0)
    figures = {f"pck_{share:g}": 100 * value for share, value in zip(SHARES, by_image.tolist(), strict=True)}
    return figures | {f"points_{share:g}": 100 * value for share, value in zip(SHARES, by_point.tolist(), strict=True)}
