"""Latencies of students, as `jobs/benchmark.py` has measured them.

Only latencies of one setting of one benchmark are comparable: they were interleaved on one machine.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.tracking.reading import LoggedRun

METRIC = re.compile(r"(?P<model>.+)/(?P<form>\w+)/(?P<precision>\w+)/(?P<batch>\d+)x(?P<size>\d+)/ms")
FORMS = ("eager", "compiled", "onnx", "fused")
"""Forms in increasing priority, for settings that cover equally many students."""


@dataclass(frozen=True)
class Latencies:
    """Milliseconds by model, and a description of the setting."""

    milliseconds: Mapping[str, float]
    setting: str


def find_latencies(benchmarks: Sequence[LoggedRun], students: Mapping[str, Collection[str]]) -> Latencies | None:
    """Find the latencies of the setting that covers the most students.

    Args:
        benchmarks: oldest first.
        students: input sizes, such as ``64 px``, by the name of the student in a benchmark.
    """
    found: dict[tuple[int, str, str, int, int], dict[str, float]] = {}
    for number, run in enumerate(benchmarks):
        for name, value in run.metrics.items():
            part = METRIC.fullmatch(name)
            if part and part["model"] in students and part["form"] in FORMS:
                setting = (number, part["form"], part["precision"], int(part["batch"]), int(part["size"]))
                found.setdefault(setting, {})[part["model"]] = value
    if not found:
        return None

    def rank(setting: tuple[int, str, str, int, int]) -> tuple[int, ...]:
        number, form, _, batch, size = setting
        at_own_size = sum(f"{size} px" in students[name] for name in found[setting])
        return len(found[setting]), at_own_size, FORMS.index(form), -batch, number, size

    best = max(found, key=rank)
    number, form, precision, batch, size = best
    run = benchmarks[number]
    device = run.params.get("benchmark.device", "")
    where = f"CPU, {run.params.get('benchmark.threads')} thread(s)" if device == "cpu" else "GPU"
    return Latencies(found[best], f"{form}, {size} px, batch {batch}, {precision}, {where}, run {run.name}")
