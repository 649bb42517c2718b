"""What an accuracy is worth: its interval over the held-out images, and the accuracy without looking at them."""

from collections import Counter
from math import sqrt

from pipeline.cache.layout.dataset import Dataset

Z = 1.959964
"""Quantile of the normal distribution at 97.5 %."""


def interval(percent: float, images: int) -> tuple[float, float]:
    """95 % interval in percent of an accuracy on `images` independent held-out images (Wilson 1927).

    It covers the choice of the images, not of the seed.
    """
    share, spread = percent / 100, Z**2 / images
    centre = share + spread / 2
    half = Z * sqrt(share * (1 - share) / images + spread / (4 * images))
    return 100 * max(0.0, (centre - half) / (1 + spread)), 100 * min(1.0, (centre + half) / (1 + spread))


def class_counts(dataset: Dataset) -> dict[int, int]:
    """Number of samples by label, the most frequent first; those without one are left out."""
    labels: Counter[int] = Counter()
    for number in range(len(dataset.selections)):
        for entry in dataset.samples(number, ["label"])["label"].drop_null().value_counts().to_pylist():
            labels[entry["values"]] += entry["counts"]
    return dict(labels.most_common())


def chance(counts: dict[int, int]) -> float:
    """Accuracy in percent of always answering the most frequent class."""
    return 100 * max(counts.values()) / sum(counts.values())
