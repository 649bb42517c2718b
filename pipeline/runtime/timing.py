"""Interleaved timing of several calls, so that drift of the machine affects all of them alike."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
QUARTILES = [0.25, 0.5, 0.75]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles over the rounds of a call's time, in seconds, and of its ratio to the reference in each round."""

    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median: some hundredths on a quiet machine."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


def interleave(
    calls: Mapping[Key, Callable[[], object]],
    reference: Callable[[Key], Key],
    rounds: int,
    seconds: float = 0.05,
) -> dict[Key, Timing]:
    """The timing of each call by its name, from one measurement per round, in a new random order each round.

    A measurement is one untimed call, then the mean of calls for at least ``seconds``. Each call must return only when its
    work is done (synchronise the device in it).

    Args:
        reference: from the name of a call to the name of the one that its ratio refers to.
    """
    order = random.Random(0)
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(_mean_time(calls[name], seconds))
    return {name: _summary(times, samples[reference(name)]) for name, times in samples.items()}


def _mean_time(call: Callable[[], object], seconds: float) -> float:
    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or count == 0:
        call()
        count += 1
    return elapsed / count


def _summary(times: list[float], reference_times: list[float]) -> Timing:
    ratios = np.divide(times, reference_times)
    low, median, high = np.quantile(times, QUARTILES).tolist()
    ratio_low, ratio, ratio_high = np.quantile(ratios, QUARTILES).tolist()
    return Timing(median, (low, high), ratio, (ratio_low, ratio_high))
