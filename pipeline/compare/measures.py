"""What is compared: name, unit, which way is better, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        key: in tables for machines, where the number is in whole units.
        label, unit: for people.
        better: which way, or None where neither is.
        scale: whole units of one of `unit`.
        digits: after the point, or None for three that are significant.
    """

    key: str
    label: str
    unit: str
    better: Literal["higher", "lower"] | None
    scale: float = 1.0
    digits: int | None = None

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def show(self, value: float) -> str:
        """The number in `unit`, without it."""
        scaled = value / self.scale
        if self.digits is not None:
            return f"{scaled:.{self.digits}f}"
        return f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:.0f}"


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("knn", "kNN", "%", "higher", digits=1),
        Measure("linear", "linear", "%", "higher", digits=1),
        Measure("top1", "top-1", "%", "higher", digits=1),
        Measure("box_ap", "box AP", "%", "higher", digits=1),
        Measure("mask_ap", "mask AP", "%", "higher", digits=1),
        Measure("miou", "mIoU", "%", "higher", digits=1),
        Measure("probe_miou", "mIoU of the probe", "%", "higher", digits=1),
        Measure("parameters", "parameters", "M", "lower", 1e6, 2),
        Measure("macs", "MACs", "G", None, 1e9),
        Measure("latency", "latency", "ms", "lower"),
        Measure("cache_bytes", "cache", "MiB", "lower", 2.0**20),
        Measure("samples_seen", "samples seen", "k", "lower", 1e3),
        Measure("hours", "time", "h", None),
        Measure("gpu_hours", "GPU hours", "", None),
        Measure("cost", "cost", "", None, digits=2),
        Measure("knn_raw", "kNN of raw weights", "%", None, digits=1),
        Measure("knn_before", "kNN before", "%", None, digits=1),
    )
}
"""By key, in the order of the tables. Accuracies are in percent, AP too."""

ACCURACIES = tuple(key for key, measure in MEASURES.items() if measure.better == "higher")
COSTS = ("parameters", "latency", "cache_bytes", "samples_seen")
"""What accuracy is held against."""

TEXTS = {
    "status": "status",
    "job": "job",
    "data": "data",
    "student": "student",
    "input": "input",
    "teachers": "teachers",
    "codec": "codec",
    "views": "views",
    "seed": "seed",
    "device": "device",
}
"""What is known of a run in words, with its label."""
