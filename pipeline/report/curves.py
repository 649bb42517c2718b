"""The curves of a run, from the file that holds what was sent to MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path

Curves = Mapping[str, Mapping[int, float]]
"""Value by step, by metric."""


def read_curves(file: Path) -> dict[str, dict[int, float]]:
    """The curves in `metrics.jsonl`; none if there is no such file. A line that a killed process left incomplete is skipped."""
    found: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            found.setdefault(name, {})[step] = float(value)
    return found


def by_epoch(curves: Curves, metric: str) -> tuple[tuple[float, float], ...]:
    """(epoch, value) of a metric; a step without an epoch, as the one before training, is at the latest epoch before it."""
    epochs = sorted(curves.get("epoch", {}).items())
    points, number, epoch = [], 0, 0.0
    for step, value in sorted(curves.get(metric, {}).items()):
        while number < len(epochs) and epochs[number][0] <= step:
            epoch = epochs[number][1]
            number += 1
        points.append((epoch, value))
    return tuple(points)
