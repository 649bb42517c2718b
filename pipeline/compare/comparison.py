"""A comparison: runs, groups, Pareto fronts and differences, as all outputs show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.compare.collect import CollectedRuns, collect
from pipeline.compare.group import Group, Summary, changes, group
from pipeline.compare.measures import COSTS, TEXTS, Measure
from pipeline.compare.significance import Difference, differences, fronts, statement
from pipeline.tracking.reading import Experiment


@dataclass(frozen=True)
class Comparison(CollectedRuns):
    """The compared runs of an experiment: its name, its store, and the MLflow filter."""

    experiment: str
    uri: str
    filter_string: str

    @classmethod
    def of(cls, experiment: Experiment, filter_string: str = "") -> Comparison:
        """Collect runs, or raise a UserError if there is nothing to compare."""
        return cls(
            **vars(collect(experiment)), experiment=experiment.name, uri=experiment.uri, filter_string=filter_string
        )

    @cached_property
    def groups(self) -> list[Group]:
        """The runs that differ only in the seed, together."""
        return group(self.entries)

    @cached_property
    def fronts(self) -> Mapping[tuple[str, str], set[int]]:
        """Numbers of the groups on the Pareto front, by accuracy and cost."""
        return fronts(self.groups, self.accuracies)

    @cached_property
    def differences(self) -> list[Difference]:
        """Between all pairs of groups on the same held-out images, in every accuracy."""
        return differences(self.groups, self.accuracies)

    @property
    def measures(self) -> list[Measure]:
        """The measures that at least one run has."""
        return [m for key, m in self.all_measures.items() if any(key in entry.measures for entry in self.entries)]

    @property
    def accuracies(self) -> list[str]:
        """Keys of the measures, higher being better, that at least one group has."""
        higher = [key for key, measure in self.all_measures.items() if measure.better == "higher"]
        return [key for key in higher if any(key in group.measures for group in self.groups)]

    @property
    def costs(self) -> list[str]:
        """Keys of the costs that at least one group has."""
        return [key for key in COSTS if any(key in group.measures for group in self.groups)]

    @property
    def main_accuracy(self) -> str | None:
        """The accuracy that most groups have, or None."""
        return max(self.accuracies, key=lambda key: sum(key in group.measures for group in self.groups), default=None)

    @property
    def held_out(self) -> str | None:
        """The held-out images that most groups were measured on."""
        every = [group.held_out for group in self.groups]
        return max(every, key=every.count)

    @property
    def best(self) -> dict[str | None, int]:
        """Number of the group with the highest main accuracy, by held-out images."""
        key = self.main_accuracy or ""
        rivals: dict[str | None, list[int]] = {}
        for number, group_ in enumerate(self.groups):
            if key in group_.measures:
                rivals.setdefault(group_.held_out, []).append(number)
        means = {number: self.groups[number].measures[key].mean for numbers in rivals.values() for number in numbers}
        return {held_out: max(numbers, key=means.__getitem__) for held_out, numbers in rivals.items()}

    @property
    def varying_texts(self) -> list[str]:
        """Keys of :data:`~pipeline.compare.measures.TEXTS` in which the runs differ."""
        return [key for key in TEXTS if len({entry.texts.get(key) for entry in self.entries}) > 1]

    @property
    def changed(self) -> list[str]:
        """Configuration fields in which groups of one job differ, and the job if there are several."""
        return changes([group.config for group in self.groups])

    def pareto_costs(self, number: int) -> list[str]:
        """Costs for which a group is on the Pareto front of the main accuracy."""
        return [cost for cost in self.costs if number in self.fronts.get((self.main_accuracy or "", cost), ())]

    def differences_to_best(self) -> list[str]:
        """A sentence on the difference of each group to the best one, in the main accuracy."""
        best = set(self.best.values())
        found = [d for d in self.differences if d.measure == self.main_accuracy and {d.first, d.second} & best]
        return [statement(d, self.groups, self.all_measures[d.measure]) for d in found]

    def notes(self) -> list[str]:
        """Notes for the reader."""
        unfinished = [entry.name for entry in self.entries if not entry.finished]
        seeds = sum(len(group.entries) - len(group.counted) for group in self.groups) - len(unfinished)
        found = [
            "A group holds all runs that differ only in the seed; ± is the standard deviation over the seeds.",
            "Parameters and MACs are those of the backbone in its inference form, on one image.",
        ]
        if self.differences:
            found.append("p-values are two-sided and not corrected for the number of comparisons.")
        if self.latency:
            found.append(f"Latency: {self.latency}.")
        if unfinished:
            found.append(f"Unfinished, and not counted in a group: {', '.join(unfinished)}.")
        if seeds:
            found.append(
                f"Among runs of equal configuration and seed only the latest counts; {seeds} earlier ones are ignored."
            )
        if len({group.held_out for group in self.groups}) > 1:
            found.append(
                "Groups were measured on different held-out images; only groups on the same images are compared."
            )
        if left_out := ", ".join(f"{count} {job}" for job, count in self.left_out.items()):
            found.append(f"Runs without a student, not shown: {left_out}.")
        return found


def format_summary(summary: Summary | None, measure: Measure) -> str:
    """Mean ± standard deviation; "" for None."""
    if summary is None:
        return ""
    text = measure.show(summary.mean)
    spread = f"{(summary.std or 0) / measure.scale:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {spread}" if float(spread) else text
