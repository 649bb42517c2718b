"""A comparison: runs, groups, Pareto fronts and differences, as all outputs show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from pipeline.compare.collect import CollectedRuns, collect
from pipeline.compare.group import Group, Summary, changes, group
from pipeline.compare.measures import COSTS, TEXTS, Measure
from pipeline.compare.significance import Difference, differences, fronts, statement
from pipeline.errors import UserError
from pipeline.tracking.reading import Experiment


@dataclass(frozen=True)
class Comparison(CollectedRuns):
    """The compared runs of an experiment: its name, its store, and the MLflow filter."""

    experiment: str
    uri: str
    filter_string: str

    @classmethod
    def of(cls, experiment: Experiment, filter_string: str = "") -> Comparison:
        """Collect runs, or raise a UserError if there is nothing to compare, or none has finished."""
        found = cls(
            **vars(collect(experiment)), experiment=experiment.name, uri=experiment.uri, filter_string=filter_string
        )
        if not found.groups:
            held = Counter(entry.texts["status"] for entry in found.entries)
            listed = ", ".join(f"{count} {status}" for status, count in held.items())
            where = "--filter: it leaves" if filter_string else "--experiment: there is"
            raise UserError(f"{where} no finished run of {experiment.name} to compare; there are only: {listed}")
        return found

    @cached_property
    def groups(self) -> list[Group]:
        """The runs that differ only in the seed, together."""
        return group(self.entries)

    @cached_property
    def group_of(self) -> Mapping[str, int]:
        """Number of the group by run id, for runs that are in one."""
        return {entry.run_id: number for number, group in enumerate(self.groups) for entry in group.entries}

    @cached_property
    def fronts(self) -> Mapping[tuple[str, str], set[int]]:
        """Numbers of the groups on the Pareto front, by accuracy and cost."""
        return fronts(self.groups, self.accuracies)

    @cached_property
    def differences(self) -> list[Difference]:
        """Between all pairs of groups, in every accuracy that both have on the same held-out images."""
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
        """The accuracy that most groups have on the same images, or None."""
        return max(self.accuracies, key=lambda key: max(map(len, self.by_images(key).values())), default=None)

    def by_images(self, measure: str) -> dict[str | None, list[int]]:
        """Numbers of the groups that have a measure, by the images that it was taken on."""
        found: dict[str | None, list[int]] = {}
        for number, group_ in enumerate(self.groups):
            if measure in group_.measures:
                found.setdefault(group_.held_out, []).append(number)
        return found

    def main_images(self, measure: str) -> str | None:
        """The images that most groups have a measure on."""
        by_images = self.by_images(measure)
        return max(by_images, key=lambda images: len(by_images[images]), default=None)

    def comparable(self, measure: str) -> list[int]:
        """Numbers of the groups that have a measure on its main images."""
        return self.by_images(measure).get(self.main_images(measure), [])

    @cached_property
    def image_sets(self) -> list[str | None]:
        """The held-out images of the groups, those of the most groups first."""
        counts = Counter(group.held_out for group in self.groups)
        return [images for images, _ in counts.most_common()]

    @property
    def best(self) -> dict[str | None, list[int]]:
        """Numbers of the groups with the highest main accuracy as it is shown, several if they tie, by held-out images."""
        found: dict[str | None, list[int]] = {}
        for images, numbers in self.by_images(key := self.main_accuracy or "").items():
            means = {number: self.groups[number].measures[key].mean for number in numbers}
            show = self.all_measures[key].show
            found[images] = [number for number in numbers if show(means[number]) == show(max(means.values()))]
        return found

    @property
    def first_pair(self) -> Difference | None:
        """The difference to show first: in the main accuracy, of the best group and the runner-up; None if there is none."""
        numbers = self.comparable(key := self.main_accuracy or "")
        ranked = sorted(numbers, key=lambda number: -self.groups[number].measures[key].mean)
        shown = [d for d in self.differences if d.measure == key and {d.first, d.second} == {*ranked[:2]}]
        return next(iter(shown or self.differences), None)

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
        best = set(chain.from_iterable(self.best.values()))
        found = [d for d in self.differences if d.measure == self.main_accuracy and {d.first, d.second} & best]
        return [statement(d, self.groups, self.all_measures[d.measure]) for d in found]

    def named(self, images: str | None) -> str:
        """Images in words: their name, and where they lie."""
        place = self.places.get(images or "")
        return (
            "unknown images" if images is None else f"{images} ({place})" if place not in (None, "", images) else images
        )


def format_summary(summary: Summary | None, measure: Measure) -> str:
    """Mean ± standard deviation; "" for None."""
    if summary is None:
        return ""
    text = measure.show(summary.mean)
    spread = f"{(summary.std or 0) / measure.scale:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {spread}" if float(spread) else text
