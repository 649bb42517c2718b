"""A comparison as files: tables, figures and the page."""

from __future__ import annotations

from pathlib import Path

from pipeline.compare.comparison import Comparison
from pipeline.compare.figures import write_figures
from pipeline.compare.html import render_page
from pipeline.compare.tables import (
    render_markdown,
    write_curves_csv,
    write_differences_csv,
    write_groups_csv,
    write_runs_csv,
)

PAGE = "comparison.html"
REPORT = "comparison.md"


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files into an existing folder, replacing those of an earlier comparison.

    Returns:
        The files: the page, the report, CSV of the runs, groups, differences and curves, and figures.
    """
    for name, writer in {
        "runs.csv": write_runs_csv,
        "groups.csv": write_groups_csv,
        "differences.csv": write_differences_csv,
        "curves.csv": write_curves_csv,
    }.items():
        writer(comparison, folder / name)
    figures = write_figures(comparison, folder)
    (folder / REPORT).write_text(render_markdown(comparison, figures), encoding="utf-8")
    (folder / PAGE).write_text(render_page(comparison), encoding="utf-8")
    tables = ["runs.csv", "groups.csv", "differences.csv", "curves.csv"]
    return [folder / name for name in (PAGE, REPORT, *tables, *(file for _, file in figures))]
