"""Groups of runs that differ only in the seed: mean, standard deviation and number of seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

from pipeline.compare.collect import Entry, Point

LABEL_FIELDS = 3
"""Most fields in the label of a group, besides student and teachers."""


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (None for one run) over `n` seeds."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary | None:
        """Of the values that are known; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(mean(known), stdev(known) if len(known) > 1 else None, len(known)) if known else None


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, of which at least one has finished.

    Attributes:
        label: unique among the groups.
        entries: all runs, oldest first.
        counted: the latest finished run of each seed, by seed; `measures` and `curve` are computed over these alone.
        config: what all runs share.
    """

    label: str
    entries: tuple[Entry, ...]
    counted: Mapping[str, Entry]
    curve: tuple[Point[Summary], ...]
    config: Mapping[str, str]

    @cached_property
    def measures(self) -> Mapping[str, Summary]:
        """Summaries by key."""
        keys = dict.fromkeys(key for entry in self.counted.values() for key in entry.measures)
        summaries = {key: Summary.of(self.values(key).values()) for key in keys}
        return {key: summary for key, summary in summaries.items() if summary}

    def values(self, measure: str) -> dict[str, float]:
        """What the summary of a measure combines, by seed."""
        counted = sorted(self.counted.items())
        return {seed: entry.measures[measure] for seed, entry in counted if measure in entry.measures}

    @cached_property
    def teacher_knn(self) -> Mapping[str, float]:
        """kNN of each teacher in percent, the mean over the runs."""
        names = dict.fromkeys(name for entry in self.counted.values() for name in entry.teacher_knn)
        found = {name: [e.teacher_knn[name] for e in self.counted.values() if name in e.teacher_knn] for name in names}
        return {name: mean(values) for name, values in found.items()}

    @property
    def texts(self) -> Mapping[str, str]:
        """Of the latest run."""
        return self.entries[-1].texts

    @property
    def held_out(self) -> str | None:
        """The held-out images that the measures of all runs were taken on; None: unknown."""
        return self.entries[-1].held_out

    @property
    def family(self) -> tuple[tuple[str, str], ...]:
        """Equal for students of several sizes that were trained in the same way from one cache."""
        size = ("student.name", "student.args", "job")
        return tuple(sorted((key, value) for key, value in self.config.items() if not key.startswith(size)))


def group(entries: Iterable[Entry]) -> list[Group]:
    """Groups in the order of their first runs; runs of which no seed has finished are in none."""
    found: dict[tuple[tuple[tuple[str, str], ...], str | None], list[Entry]] = {}
    for entry in entries:
        found.setdefault((tuple(sorted(_config(entry).items())), entry.held_out), []).append(entry)
    members = [runs for runs in found.values() if any(entry.finished for entry in runs)]
    return [_group(label, runs) for label, runs in zip(_labels(members), members, strict=True)]


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values differ, sorted; a missing key counts as a value.

    If some configurations lack a teacher, its model represents all of its fields that are equal in the others.
    """
    keys = sorted({key for config in configs for key in config})
    changed = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    details = {key for key in changed if re.match(r"teachers\.\d+\.(?!model$)", key)}
    return [key for key in changed if key not in details or len({c[key] for c in configs if key in c}) > 1]


def changes(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys in which configurations of one job differ, sorted; preceded by `job` if there are several jobs."""
    jobs = {config["job"] for config in configs}
    within = {key for job in jobs for key in differing([config for config in configs if config["job"] == job])}
    return [*(["job"] if len(jobs) > 1 else []), *sorted(within)]


def _config(entry: Entry) -> dict[str, str]:
    return {**entry.config, "job": entry.texts.get("job", "")}


def _group(label: str, runs: list[Entry]) -> Group:
    counted = {entry.texts.get("seed", entry.run_id): entry for entry in runs if entry.finished}
    points: dict[float, list[Point[float]]] = {}
    for point in (point for entry in counted.values() for point in entry.curve):
        points.setdefault(point.epoch, []).append(point)
    curve = (
        Point(epoch, Summary.of(point.knn for point in members), Summary.of(point.raw for point in members))
        for epoch, members in sorted(points.items())
    )
    return Group(label, tuple(runs), counted, tuple(curve), _config(runs[-1]))


def _labels(members: Sequence[Sequence[Entry]]) -> list[str]:
    """Student, teachers if they differ, and the fields that distinguish groups of equal student and teachers."""
    latest = [runs[-1] for runs in members]
    names = ["student", "teachers"] if len({entry.texts.get("teachers") for entry in latest}) > 1 else ["student"]
    plain = [" · ".join(entry.texts[name] for name in names if name in entry.texts) or entry.name for entry in latest]
    labels: list[str] = []
    for entry, label in zip(latest, plain, strict=True):
        rivals = [other for other, own in zip(latest, plain, strict=True) if own == label]
        changed = changes([_config(other) for other in rivals])
        shown = [key for key in changed if not (key.startswith("teachers.") and "teachers" in names)] or changed
        values = [f"{key.rpartition('.')[2]}={_config(entry).get(key, 'none')[:24]}" for key in shown[:LABEL_FIELDS]]
        label = " · ".join([label, *values])
        taken = sum(other == label or other.startswith(f"{label} #") for other in labels)
        labels.append(f"{label} #{taken + 1}" if taken else label)
    return labels
