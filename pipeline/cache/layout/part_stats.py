"""Statistics of a teacher's shards in a part, in one file: exact for all shards together, rounded for each of them.

Training standardises by the sum of parts, so their statistics are kept as exactly as features are known (float32). Those of a
single shard only tell a wrong shard from a right one, or a changed one from the others: a byte per channel suffices for its mean,
as deviation from the part's mean in units of the part's deviation, and one for the ratio of the deviations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.cache.layout.arrays import dump_arrays, eight_bits, kinds_of, load_arrays
from pipeline.cache.layout.stats import Moments, merge_all

STATISTICS = "statistics.npz"
"""Name of the file, which replaces those of the shards once all shards are there."""
ROUNDING = 0.05
"""Deviations of the part by which the rounded mean of a shard may differ; shards of other values differ by more."""


@dataclass(frozen=True)
class PartStats:
    """Count, mean and deviation by token type of the shards of a part, which are named by their Parquet files.

    Attributes:
        together: of all of them.
        shards: of each, by file, in order; rounded if they come from the file.
    """

    together: Mapping[str, Moments]
    shards: Mapping[str, Mapping[str, Moments]]

    @classmethod
    def of(cls, shards: Mapping[str, Mapping[str, Moments]]) -> PartStats:
        """Merge the statistics of shards, of which there is at least one."""
        return cls(merge_all(shards.values()), shards)

    def says(self, file: str, moments: Mapping[str, Moments]) -> bool:
        """Whether a shard's statistics are those that are kept of it, up to their rounding."""
        kept = self.shards[file]
        return kept.keys() == moments.keys() and all(
            kept[kind].count == part.count
            and kept[kind].mean.shape == part.mean.shape
            and np.all(
                np.abs(kept[kind].mean - part.mean) <= ROUNDING * self.together[kind].std + 1e-6 * abs(part.mean)
            )
            for kind, part in moments.items()
        )


def dump_part_stats(stats: PartStats) -> bytes:
    """The statistics as the bytes of an .npz file.

    By token type, with few arrays, each of which costs 200 bytes: ``together`` [2, D] float32, mean and deviation; ``shards``
    [S, 2, D] int8, the same of each shard; ``about`` [S, 3] float64, count of its vectors and units of its mean and deviation.
    """
    arrays: dict[str, object] = {"files": np.array([file.encode() for file in stats.shards])}
    for kind, whole in stats.together.items():
        shards = [moments[kind] for moments in stats.shards.values()]
        mean, std = together = np.stack([whole.mean, whole.std]).astype(np.float32)
        means, units = eight_bits(np.stack([_over(part.mean - mean, std) for part in shards]))
        stds, std_units = eight_bits(np.stack([_over(part.std - std, std) for part in shards]))
        about = np.stack([[part.count for part in shards], units, std_units], axis=1)
        arrays |= {
            f"{kind}_together": together,
            f"{kind}_shards": np.stack([means, stds], axis=1),
            f"{kind}_about": about,
        }
    return dump_arrays(arrays)


def load_part_stats(data: bytes) -> PartStats:
    """The inverse of :func:`dump_part_stats`; ValueError or KeyError if a field is missing or does not fit the others."""
    arrays = load_arrays(data)
    files = [str(name, "ascii") for name in arrays.pop("files").tolist()]
    together: dict[str, Moments] = {}
    shards: dict[str, dict[str, Moments]] = {file: {} for file in files}
    for kind in kinds_of(arrays):
        mean, std = arrays[f"{kind}_together"].astype(np.float64)
        counts, units, std_units = arrays[f"{kind}_about"].T
        total = int(counts.sum())
        together[kind] = Moments(total, mean, std**2 * total)
        means, stds = arrays[f"{kind}_shards"].transpose(1, 0, 2)
        means, stds = mean + means * units[:, None] * std, std + stds * std_units[:, None] * std
        for file, number, middle, deviation in zip(files, counts.astype(int).tolist(), means, stds, strict=True):
            shards[file][kind] = Moments(number, middle, deviation**2 * number)
    if not together or not files:
        raise ValueError("it holds no statistics")
    return PartStats(together, shards)


def _over(values: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Values in units of the deviation; 0 where that is 0, since no shard differs there."""
    return np.divide(values, std, out=np.zeros(len(std)), where=std > 0)
