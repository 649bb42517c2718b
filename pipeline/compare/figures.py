"""The plots of a comparison as PNG files, for reports and MLflow."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from pipeline.compare.comparison import Comparison
from pipeline.compare.measures import KNN
from pipeline.compare.plots import Plot, Trace, cost_plot, curves_plot, size_plot

matplotlib.use("Agg")

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "star": "*", "cross": "P"}
"""matplotlib's names of plotly's symbols."""
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
RC_PARAMS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,  # names of runs may hold $
}


def write_figures(comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """Write `figure1.png` and so on for the available data; returns title and file name of each."""
    accuracy, images = comparison.main_accuracy, comparison.main_images(KNN.key)
    costs = [cost for cost in comparison.costs if cost in ("parameters", "latency")] or comparison.costs[:1]
    panels = {
        (1, "Accuracy against cost"): (
            [cost_plot(comparison, comparison.main_images(accuracy), accuracy, cost) for cost in costs]
            if accuracy
            else []
        ),
        (3, "kNN over the epochs"): [curves_plot(comparison, images)],
        (4, "kNN against the size of the student"): [size_plot(comparison, images)],
    }
    drawn = []
    with matplotlib.rc_context(RC_PARAMS):
        for (number, title), plots in panels.items():
            file = f"figure{number}.png"
            (folder / file).unlink(missing_ok=True)  # of an earlier comparison
            if any(plot["data"] for plot in plots):
                _draw(plots, named=number == 4).savefig(folder / file, dpi=160)
                drawn.append((title, file))
    return drawn


def _draw(plots: Sequence[Plot], named: bool) -> Figure:
    """Plots side by side; `named`: with the name of the student at every point."""
    figure = Figure(figsize=(4.2 * len(plots) + 2.6, 4.7), layout="constrained")
    panels = figure.subplots(1, len(plots), squeeze=False, sharey=True)[0]
    for panel, plot in zip(panels, plots, strict=True):
        for trace in plot["data"]:
            _draw_trace(panel, trace)
            if named and trace["meta"]["role"] == "point":
                at = trace["x"][0], trace["y"][0]
                panel.annotate(trace["meta"]["student"], at, xytext=(7, -10), textcoords="offset points", fontsize=7)
        axis = plot["layout"]["xaxis"]
        panel.set(xlabel=axis["title"]["text"], xmargin=0.15 if named else 0.05)
        if "dtick" in axis:
            panel.xaxis.set_major_locator(MultipleLocator(axis["dtick"]))
    panels[0].set_ylabel(plots[0]["layout"]["yaxis"]["title"]["text"])
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    return figure


def _draw_trace(panel: Any, trace: Trace) -> None:
    symbol = trace.get("marker", {}).get("symbol", "")
    line, marker, error = trace.get("line", {}), trace.get("marker", {}), trace.get("error_y", {})
    if "fill" in trace:
        panel.fill(trace["x"], trace["y"], color=trace["fillcolor"], linewidth=0)
        return
    panel.errorbar(
        trace["x"],
        trace["y"],
        error["array"] if error.get("visible") else None,
        label=html.unescape(trace["name"]) if trace.get("showlegend", True) else None,
        color=marker.get("color") or line.get("color", "0.5"),
        linestyle=DASHES[line.get("dash", "solid")] if "lines" in trace["mode"] else "none",
        linewidth=line.get("width", 0),
        drawstyle="steps-post" if line.get("shape") == "hv" else "default",
        marker=MARKERS.get(symbol.removesuffix("-open"), "none"),
        fillstyle="none" if symbol.endswith("-open") else "full",
        markersize=marker.get("size", 0) / 1.6,
        capsize=2,
        elinewidth=1,
    )
