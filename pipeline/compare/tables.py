"""A comparison as tables: for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.compare.comparison import Comparison, format_summary
from pipeline.compare.measures import TEXTS

Rows = list[list[str]]
"""The first row is the header."""


def groups_table(comparison: Comparison) -> Rows:
    """One row per group: mean ± standard deviation."""
    measures = comparison.measures
    rows = [["group", "seeds", *(measure.title for measure in measures), "on the front"]]
    for number, group in enumerate(comparison.groups):
        marks = [
            comparison.all_measures[cost].label for cost in comparison.pareto_costs(number, comparison.main_accuracy)
        ]
        values = [format_summary(group.measures.get(measure.key), measure) for measure in measures]
        rows.append([group.label, str(len(group.counted)), *values, ", ".join(marks)])
    return rows


def runs_table(comparison: Comparison) -> Rows:
    """One row per run: the texts in which runs differ, and all measures."""
    measures, texts = comparison.measures, comparison.varying_texts
    rows = [["run", *(TEXTS[key] for key in texts), *(measure.title for measure in measures)]]
    for entry in comparison.entries:
        values = [
            measure.show(entry.measures[measure.key]) if measure.key in entry.measures else "" for measure in measures
        ]
        rows.append([entry.name, *(entry.texts.get(key, "") for key in texts), *values])
    return rows


def changes_table(comparison: Comparison) -> Rows:
    """One row per group: the fields in which groups differ."""
    rows = [["group", *comparison.changed]]
    return [*rows, *([group.label, *(group.config.get(key, "") for key in rows[0][1:])] for group in comparison.groups)]


def common(comparison: Comparison) -> str:
    """The texts that all runs share, in one line."""
    first = comparison.entries[0].texts
    same = [key for key in TEXTS if key in first and key not in comparison.varying_texts]
    return ", ".join(f"{TEXTS[key]} {first[key]}" for key in same)


def render_text(comparison: Comparison) -> str:
    """Text for the terminal, without control characters."""
    parts = [f"{comparison.experiment}: {len(comparison.entries)} runs in {len(comparison.groups)} groups"]
    parts += [_aligned(runs_table(comparison)), f"all: {common(comparison)}", _aligned(groups_table(comparison))]
    if comparison.changed:
        parts.append(_aligned(changes_table(comparison)))
    parts += ["\n".join(comparison.differences_to_best()), "\n".join(comparison.notes())]
    return "\n\n".join(_printable(part) for part in parts if part)


def render_markdown(comparison: Comparison, figures: Iterable[tuple[str, str]]) -> str:
    """A Markdown report.

    Args:
        figures: title and file name of each.
    """
    bullets = [_prose(line) for line in (*comparison.differences_to_best(), *comparison.notes())]
    parts = [
        f"# {_prose(comparison.experiment)}: {len(comparison.entries)} runs in {len(comparison.groups)} groups",
        f"Filter: {_prose(comparison.filter_string)}" if comparison.filter_string else "",
        "## Groups",
        _pipes(groups_table(comparison)),
        *(f"![{title}]({file})" for title, file in figures),
        "## Fields in which the groups differ" if comparison.changed else "",
        _pipes(changes_table(comparison)) if comparison.changed else "",
        "## Differences and notes",
        "\n".join(f"- {line}" for line in bullets),
        "## Runs",
        _pipes(runs_table(comparison)),
        f"All: {_prose(common(comparison))}" if common(comparison) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_runs_csv(comparison: Comparison, file: Path) -> None:
    """All texts and unscaled measures of all runs; unknown values are empty."""
    header = ["run_id", "name", "group", "held_out", *TEXTS, *comparison.all_measures]
    group_of = {entry.run_id: group.label for group in comparison.groups for entry in group.entries}
    rows = (
        [
            *(entry.run_id, entry.name, group_of[entry.run_id], entry.held_out or ""),
            *(entry.texts.get(key, "") for key in TEXTS),
            *(entry.measures.get(key) for key in comparison.all_measures),
        ]
        for entry in comparison.entries
    )
    _write_csv(file, header, rows)


def write_groups_csv(comparison: Comparison, file: Path) -> None:
    """Mean, standard deviation and number of seeds of each measure by group."""
    columns = [(key, part) for key in comparison.all_measures for part in ("mean", "std", "n")]
    header = ["group", "held_out", *(f"{key}_{part}" for key, part in columns), "front"]
    rows = (
        [
            group.label,
            group.held_out or "",
            *(getattr(group.measures.get(key), part, None) for key, part in columns),
            " ".join(comparison.pareto_costs(number, comparison.main_accuracy)),
        ]
        for number, group in enumerate(comparison.groups)
    )
    _write_csv(file, header, rows)


def write_differences_csv(comparison: Comparison, file: Path) -> None:
    """All pairs of groups on the same held-out images, in every accuracy."""
    header = ["measure", "first", "second", "difference", "test", "n_first", "n_second", "p", "low", "high"]
    rows = (
        [
            *(d.measure, comparison.groups[d.first].label, comparison.groups[d.second].label, d.delta),
            *(d.test or "", *d.n, d.p, *(d.interval or (None, None))),
        ]
        for d in comparison.differences
    )
    _write_csv(file, header, rows)


def write_curves_csv(comparison: Comparison, file: Path) -> None:
    """kNN by run and epoch, of the averaged and the raw weights."""
    rows = (
        [entry.run_id, entry.name, point.epoch, point.knn, point.raw]
        for entry in comparison.entries
        for point in entry.curve
    )
    _write_csv(file, ["run_id", "name", "epoch", "knn", "knn_raw"], rows)


def _write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        writer.writerows([_cell(value) if isinstance(value, str) else value for value in row] for row in rows)


def _cell(text: str) -> str:
    """Prefix text that a spreadsheet would execute as a formula with an apostrophe (OWASP, CSV injection)."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _aligned(rows: Rows) -> str:
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _printable(text: str) -> str:
    return "".join(c for c in text if c == "\n" or unicodedata.category(c)[0] != "C")


def _pipes(rows: Rows) -> str:
    lines = ["| " + " | ".join(_prose(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _prose(text: str) -> str:
    """Escape text for Markdown: no markup, HTML or table cells."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(_printable(text).split()))
