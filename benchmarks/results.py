"""Studies that take hours: finished runs are kept as JSON lines and not repeated."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def study_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Parser with the options of every study: seeds, and the file of finished runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    kept = Path(f"work/{name}.jsonl")
    parser.add_argument("--results", type=Path, default=kept, help="file of finished runs, which are not repeated")
    return parser


def measure_once(results: Path, run: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Read the line that `run` identifies from the JSON lines of `results`; if it is not there, measure and append it."""
    lines = results.read_text().splitlines() if results.exists() else []
    for row in map(json.loads, lines):
        if run.items() <= row.items():
            return dict(row)
    results.parent.mkdir(parents=True, exist_ok=True)
    row = {**run, **measure()}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def mean_and_deviation(values: Sequence[float], divisor: float = 1.0) -> str:
    """Mean ± sample standard deviation over `divisor`, with two digits; the mean alone for one value, "" for none."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values) / divisor:.2f}" if len(values) > 1 else "")
