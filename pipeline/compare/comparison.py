"""A comparison: what was collected, grouped and judged, for all that is written of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.compare.collect import Collection, Entry, collect
from pipeline.compare.group import Group, Summary, changes, group
from pipeline.compare.judge import Difference, differences, fronts, statement
from pipeline.compare.measures import COSTS, TEXTS, Measure, accuracies_of
from pipeline.tracking.reading import Experiment


@dataclass(frozen=True)
class Comparison:
    """Runs of an experiment beside each other.

    Attributes:
        experiment, uri, only: name, store and filter.
        collection: the runs.
        groups: runs that differ in the seed alone.
        fronts: numbers of the groups on the Pareto front, by accuracy and cost.
        differences: of every two groups.
    """

    experiment: str
    uri: str
    only: str
    collection: Collection
    groups: tuple[Group, ...]
    fronts: Mapping[tuple[str, str], set[int]]
    differences: tuple[Difference, ...]

    @classmethod
    def of(cls, experiment: Experiment, only: str = "") -> Comparison:
        """Collect, group and judge.

        Raises:
            UserError: where there is nothing to compare.
        """
        collection = collect(experiment)
        groups = tuple(group(collection.entries))
        accuracies = accuracies_of(collection.measures)
        judged = fronts(groups, accuracies), tuple(differences(groups, accuracies))
        return cls(experiment.name, experiment.uri, only, collection, groups, *judged)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The runs, oldest first."""
        return self.collection.entries

    @property
    def all_measures(self) -> Mapping[str, Measure]:
        """By key, in the order of the tables."""
        return self.collection.measures

    @property
    def measures(self) -> list[Measure]:
        """Those that a run has."""
        return [m for key, m in self.all_measures.items() if any(key in entry.measures for entry in self.entries)]

    @property
    def accuracies(self) -> list[str]:
        """Keys of those that a group has."""
        return [key for key in accuracies_of(self.all_measures) if any(key in group.measures for group in self.groups)]

    @property
    def costs(self) -> list[str]:
        """Keys of those that a group has."""
        return [key for key in COSTS if any(key in group.measures for group in self.groups)]

    @property
    def chief(self) -> str | None:
        """The accuracy that the most groups have, or None."""
        every = self.accuracies
        return max(every, key=lambda key: sum(key in group.measures for group in self.groups)) if every else None

    @property
    def held_out(self) -> str | None:
        """The held-out images that the most groups were measured on."""
        every = [group.held_out for group in self.groups]
        return max(every, key=every.count)

    @property
    def best(self) -> dict[str | None, int]:
        """Number of the group with the highest chief accuracy, by held-out images."""
        chief, found = self.chief, dict[str | None, int]()
        for number, group_ in enumerate(self.groups):
            if chief is None or chief not in group_.measures:
                continue
            before = found.setdefault(group_.held_out, number)
            if group_.measures[chief].mean > self.groups[before].measures[chief].mean:
                found[group_.held_out] = number
        return found

    @property
    def varying_texts(self) -> list[str]:
        """Keys of :data:`~pipeline.compare.measures.TEXTS` that the runs differ in."""
        return [key for key in TEXTS if len({entry.texts.get(key) for entry in self.entries}) > 1]

    @property
    def changed(self) -> list[str]:
        """Fields of the configuration that groups of one job differ in, and the job if there are several."""
        return changes([group.config for group in self.groups])

    def on_fronts(self, number: int, accuracy: str | None) -> list[str]:
        """Costs against which a group is on the Pareto front."""
        return [cost for cost in self.costs if accuracy and number in self.fronts.get((accuracy, cost), ())]

    def against_best(self) -> list[str]:
        """What there is to say of every group beside the best one, in the chief accuracy."""
        best = set(self.best.values())
        told = [d for d in self.differences if d.measure == self.chief and {d.first, d.second} & best]
        return [statement(d, self.groups, self.all_measures[d.measure]) for d in told]

    def notes(self) -> list[str]:
        """What a reader must know."""
        left_out = ", ".join(f"{count} {job}" for job, count in self.collection.left_out.items())
        unfinished = [entry.name for entry in self.entries if not entry.finished]
        seeds = sum(len(group.entries) - len(group.counted) for group in self.groups) - len(unfinished)
        found = [
            "A group is all runs that differ in nothing but the seed; ± is the standard deviation over the seeds.",
            "Parameters and MACs are those of the backbone in its inference form on one image.",
        ]
        if self.differences:
            found.append("p-values are two-sided and not corrected for the number of comparisons.")
        if self.collection.latency:
            found.append(f"Latency: {self.collection.latency}.")
        if unfinished:
            found.append(f"Not finished, and not counted in a group: {', '.join(unfinished)}.")
        if seeds:
            found.append(
                f"Of runs with the same configuration and seed the latest counts: {seeds} earlier ones do not."
            )
        if len({group.held_out for group in self.groups}) > 1:
            found.append("Groups were measured on different held-out images; only those on the same are held together.")
        if left_out:
            found.append(f"Runs without a student of their own, which are no rows: {left_out}.")
        return found


def shown(summary: Summary | None, measure: Measure) -> str:
    """Mean ± standard deviation, or nothing."""
    if summary is None:
        return ""
    text = measure.show(summary.mean)
    spread = f"{(summary.std or 0) / measure.scale:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {spread}" if float(spread) else text
