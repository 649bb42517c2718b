"""A comparison as tables: for the terminal, Markdown and CSV."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.compare.collect import Entry
from pipeline.compare.comparison import Comparison, format_summary
from pipeline.compare.group import Group
from pipeline.compare.measures import TEXTS
from pipeline.compare.notes import notes

Rows = list[list[str]]
"""The first row is the header."""


def groups_table(comparison: Comparison) -> Rows:
    """One row per group: mean ± standard deviation."""
    measures = comparison.measures
    rows = [["group", *_images(comparison, None), "seeds", *(measure.title for measure in measures), "on the front"]]
    for number, group in enumerate(comparison.groups):
        marks = [comparison.all_measures[cost].label for cost in comparison.pareto_costs(number)]
        shown = [format_summary(group.measures.get(measure.key), measure) for measure in measures]
        images = _images(comparison, group)
        rows.append([group.label, *images, str(len(group.counted)), *shown, ", ".join(marks)])
    return rows


def runs_table(comparison: Comparison) -> Rows:
    """One row per run: the texts in which runs differ, and all measures."""
    measures, texts = comparison.measures, comparison.varying_texts
    rows = [["run", *_images(comparison, None), *texts, *(measure.title for measure in measures)]]
    for entry in comparison.entries:
        known = entry.measures
        values = [measure.show(known[measure.key]) if measure.key in known else "" for measure in measures]
        images = _images(comparison, entry)
        rows.append([entry.name, *images, *(entry.texts.get(key, "") for key in texts), *values])
    return rows


def _images(comparison: Comparison, row: Entry | Group | None) -> list[str]:
    """The cell that names the held-out images of a row, or of the header, if there are several sets."""
    if len(comparison.image_sets) < 2:
        return []
    return ["held out" if row is None else row.held_out or "unknown"]


def changes_table(comparison: Comparison) -> Rows:
    """One row per group: the fields in which groups differ."""
    rows = [["group", *comparison.changed]]
    return [*rows, *([group.label, *(group.config.get(key, "") for key in rows[0][1:])] for group in comparison.groups)]


def common(comparison: Comparison) -> str:
    """The texts that all runs share, in one line."""
    first = comparison.entries[0].texts
    same = [key for key in TEXTS if key in first and key not in comparison.varying_texts]
    return ", ".join(f"{key} {first[key]}" for key in same)


def render_text(comparison: Comparison) -> str:
    """Text for the terminal, without control characters."""
    parts = [f"{comparison.experiment}: {len(comparison.entries)} runs in {len(comparison.groups)} groups"]
    parts += [_aligned(runs_table(comparison)), f"all: {common(comparison)}", _aligned(groups_table(comparison))]
    if comparison.changed:
        parts.append(_aligned(changes_table(comparison)))
    parts += ["\n".join(comparison.differences_to_best()), "\n".join(notes(comparison))]
    return "\n\n".join(_printable(part) for part in parts if part)


def render_markdown(comparison: Comparison, figures: Iterable[tuple[str, str]]) -> str:
    """A Markdown report with figures, given as title and file name."""
    bullets = [_prose(line) for line in (*comparison.differences_to_best(), *notes(comparison))]
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


def runs_frame(comparison: Comparison) -> pd.DataFrame:
    """All texts and unscaled measures of all runs, with the held-out images that they were measured on."""
    groups, number = comparison.groups, comparison.group_of
    labels = {run_id: groups[at].label for run_id, at in number.items()}
    rows: list[dict[str, Any]] = [
        {"run_id": entry.run_id, "name": entry.name, "group": labels.get(entry.run_id), "held_out": entry.held_out}
        | {**entry.texts, **entry.measures}
        for entry in comparison.entries
    ]
    return _frame(rows, ["run_id", "name", "group", "held_out", *TEXTS, *comparison.all_measures])


def groups_frame(comparison: Comparison) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of each measure by group, as in :func:`runs_frame`."""
    rows = [
        {f"{key}_{part}": value for key, summary in group.measures.items() for part, value in vars(summary).items()}
        | {"group": group.label, "held_out": group.held_out, "front": " ".join(comparison.pareto_costs(number))}
        for number, group in enumerate(comparison.groups)
    ]
    statistics = [f"{key}_{part}" for key in comparison.all_measures for part in ("mean", "std", "n")]
    return _frame(rows, ["group", "held_out", *statistics, "front"])


def differences_frame(comparison: Comparison) -> pd.DataFrame:
    """All pairs of groups in every accuracy that both have on the same held-out images."""
    columns = ["measure", "first", "second", "held_out"]
    columns += ["difference", "test", "n_first", "n_second", "p", "low", "high"]
    rows = []
    for d in comparison.differences:
        first, second = comparison.groups[d.first], comparison.groups[d.second]
        pair = (d.measure, first.label, second.label, first.held_out)
        rows.append([*pair, d.delta, d.test, *d.n, d.p, *(d.interval or (None, None))])
    return _frame((dict(zip(columns, row, strict=True)) for row in rows), columns)


def curves_frame(comparison: Comparison) -> pd.DataFrame:
    """kNN by run and epoch, of the averaged and the raw weights."""
    rows: list[dict[str, Any]] = [
        {"run_id": entry.run_id, "name": entry.name, "epoch": point.epoch, "knn": point.knn, "knn_raw": point.raw}
        for entry in comparison.entries
        for point in entry.curve
    ]
    return _frame(rows, ["run_id", "name", "epoch", "knn", "knn_raw"])


def _frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table for a CSV file; as objects, integers next to unknown values do not become floats."""
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    return pd.DataFrame(cells, columns=list(columns), dtype=object)


def _cell(value: Any) -> Any:
    """Prefix text that a spreadsheet would execute as a formula with an apostrophe (OWASP, CSV injection)."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


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
