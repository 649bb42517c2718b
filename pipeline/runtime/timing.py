"""Times of several calls measured side by side, so that drift of the machine falls on all of them alike."""

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
    """Time of one call over the rounds: median and quartiles in seconds, and the same of its ratio to the reference.

    The ratio is taken within each round, where both were measured under the same conditions.
    """

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
    """Time every call once a round, in an order drawn anew for each round.

    A visit runs the call once untimed, then repeats it for at least ``seconds`` and keeps the mean. Each call must
    return only when its work is done (synchronise the device in it).

    Args:
        calls: what to time, by name.
        reference: from each name, the one that its ratio refers to.
        rounds: visits of each call.
        seconds: time that a visit lasts at least.
        seed: of the order.

    Returns:
        the timing of each call, in the order of ``calls``.
    """
    order = random.Random(seed)
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(_visit(calls[name], seconds))
    return {name: _summary(times, samples[reference(name)]) for name, times in samples.items()}


def _visit(call: Callable[[], object], seconds: float) -> float:
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
