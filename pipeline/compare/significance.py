"""Pareto fronts of groups, and t-tests between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import isfinite
from statistics import mean

from scipy import stats

from pipeline.compare.group import Group
from pipeline.compare.measures import COSTS, Measure

SIGNIFICANT = 0.05
PAIRED, WELCH = "paired by seed", "Welch"


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points (accuracy, cost) that no other point dominates.

    A point dominates another if it is no worse in both and better in one.
    """
    return {
        number
        for number, (accuracy, cost) in enumerate(points)
        if not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
    }


def fronts(groups: Sequence[Group], accuracies: Sequence[str]) -> dict[tuple[str, str], set[int]]:
    """Numbers of the groups on the Pareto front, by accuracy and cost; each set of images has its own front."""
    found: dict[tuple[str, str], set[int]] = {}
    for accuracy, cost in product(accuracies, COSTS):
        by_images: dict[str | None, dict[int, tuple[float, float]]] = {}
        for number, group in enumerate(groups):
            if {accuracy, cost} <= group.measures.keys():
                point = (group.measures[accuracy].mean, group.measures[cost].mean)
                by_images.setdefault(group.held_out, {})[number] = point
        for points in by_images.values():
            on_front = front(list(points.values()))
            found.setdefault((accuracy, cost), set()).update(list(points)[index] for index in on_front)
    return found


@dataclass(frozen=True)
class Difference:
    """The difference between two groups, and its significance.

    Attributes:
        measure: its key.
        first, second: numbers of the groups.
        delta: mean of the first minus mean of the second, over the compared seeds.
        test: ``paired by seed`` or ``Welch``, or None if no test is possible.
        n: seeds of the first and the second.
        p: two-sided, not corrected for the number of comparisons.
        interval: 95 % confidence interval of the difference.
    """

    measure: str
    first: int
    second: int
    delta: float
    test: str | None
    n: tuple[int, int]
    p: float | None = None
    interval: tuple[float, float] | None = None


def differences(groups: Sequence[Group], accuracies: Sequence[str]) -> list[Difference]:
    """Differences between all pairs of groups in every accuracy that both have on the same held-out images."""
    return [
        difference(measure, groups, one, other)
        for one, other in combinations(range(len(groups)), 2)
        for measure in accuracies
        if measure in groups[one].measures.keys() & groups[other].measures.keys()
        and groups[one].held_out == groups[other].held_out
    ]


def difference(measure: str, groups: Sequence[Group], one: int, other: int) -> Difference:
    """Student's t-test paired by seed if both groups have the same seeds, else Welch's t-test (scipy.stats).

    No test is possible with fewer than two seeds in a group, or without any spread.
    """
    first, second = groups[one].values(measure), groups[other].values(measure)
    paired = first.keys() == second.keys()
    a, b = list(first.values()), [second[seed] for seed in first] if paired else list(second.values())
    delta, n = mean(a) - mean(b), (len(a), len(b))
    spread = [x - y for x, y in zip(a, b, strict=True)] if paired else [*(x - a[0] for x in a), *(y - b[0] for y in b)]
    if min(n) < 2 or max(spread) - min(spread) < 1e-9:
        return Difference(measure, one, other, delta, None, n)
    result = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = (float(bound) for bound in result.confidence_interval(0.95))
    assert isfinite(result.pvalue)
    test = PAIRED if paired else WELCH
    return Difference(measure, one, other, delta, test, n, float(result.pvalue), (low, high))


def statement(found: Difference, groups: Sequence[Group], measure: Measure) -> str:
    """A sentence on a difference; the group with the higher mean comes first."""
    unit, points = (" %", " points") if measure.unit == "%" else (f" {measure.unit}".rstrip(), "")
    sign = 1 if found.delta >= 0 else -1
    more, less = (groups[number] for number in (found.first, found.second)[::sign])
    a, b = (group.measures[found.measure].mean for group in (more, less))
    text = (
        f"{more.label} ({measure.show(a)}{unit}) is {measure.show(abs(found.delta))}{points or unit} above "
        f"{less.label} ({measure.show(b)}{unit})"
    )
    n = found.n[::sign]
    if found.test is None or found.p is None or found.interval is None:
        why = f"{n[0]} and {n[1]} seeds, at least two of each are needed" if min(n) < 2 else "no spread over the seeds"
        return f"{text}. Significance unknown: {why}."
    low, high = sorted(sign * bound for bound in found.interval)
    test = f"paired by seed, {n[0]} seeds" if found.test == PAIRED else f"Welch, {n[0]} and {n[1]} seeds"
    verdict = "significant" if found.p < SIGNIFICANT else "not significant"
    p = "p < 0.0001" if found.p < 1e-4 else f"p = {found.p:.2g}"
    interval = f"95 % confidence interval {measure.show(low)} to {measure.show(high)}"
    return f"{text}; {interval}, {p} (t-test, {test}): {verdict} at 5 %."
