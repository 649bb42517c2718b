"""Interleaved timing of several calls, so that drift of the machine affects all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Median and quartiles over the rounds of a call's time, in seconds, and of its ratio to the reference in each round."""

    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


def interleave(
    calls: Mapping[Key, Callable[[], object]],
    reference: Callable[[Key], Key],
    rounds: int,
    seconds: float = 0.05,
    seed: int = 0,
) -> dict[Key, Timing]:
    """Time every call once per round, in a new random order each round.

    A measurement is one untimed call, then the mean of calls for at least ``seconds``. Each call must return only when its
    work is done (synchronise the device in it).

    Args:
        calls: by name.
        reference: name of the call that the ratio of a name refers to.
        rounds: measurements of each call.
        seconds: shortest duration of a measurement.
        seed: of the order.

    Returns:
        The timing of each call, in the order of ``calls``.
    """
    order = random.Random(seed)
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


def _summary(times: list[float], base: list[float]) -> Timing:
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    return Timing(statistics.median(times), _quartiles(times), statistics.median(ratios), _quartiles(ratios))


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
