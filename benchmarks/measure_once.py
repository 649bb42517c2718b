"""Runs of a benchmark that takes hours, kept line by line: one that is there is not repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def measure_once(results: Path, run: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a run: from the JSON lines of `results`, else measured now and added to them.

    Args:
        run: what tells it from the others.
        measure: gives what else its line is to hold.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    for row in map(json.loads, lines):
        if run.items() <= row.items():
            return dict(row)
    results.parent.mkdir(parents=True, exist_ok=True)
    row = {**run, **measure()}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row
