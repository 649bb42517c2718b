"""Figures 1, 3 and 4 of the ReGLA paper from the compared runs, as PNG files; the style of every group in all figures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.compare.comparison import Comparison
from pipeline.compare.group import Group
from pipeline.compare.measures import KNN, PARAMETERS, Measure
from pipeline.report.chart import COLOURS

matplotlib.use("Agg")

T = TypeVar("T")

SYMBOLS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("star", "*"), ("cross", "P"))
"""Equal markers of plotly and of matplotlib."""
RC_PARAMS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,  # names of runs may hold $
}


@dataclass(frozen=True)
class Style:
    """How a group is drawn: its colour, and its marker in plotly (`symbol`) and in matplotlib."""

    colour: str
    symbol: str
    marker: str


def styles(groups: Sequence[Group]) -> list[Style]:
    """Colour by teachers and marker by student if that distinguishes all groups; otherwise a style per group."""
    teachers = [group.texts.get("teachers", "") for group in groups]
    students = [group.texts.get("student", "") for group in groups]
    if len(set(teachers)) == 1:
        teachers, students = students, teachers
    if len(set(zip(teachers, students, strict=True))) < len(groups):
        teachers, students = [group.label for group in groups], [""] * len(groups)
    return [
        Style(_pick(COLOURS, teachers, teacher), *_pick(SYMBOLS, students, student))
        for teacher, student in zip(teachers, students, strict=True)
    ]


def _pick(values: Sequence[T], names: Sequence[str], name: str) -> T:
    return values[list(dict.fromkeys(names)).index(name) % len(values)]


def write_figures(comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """Write `figure1.png` and so on for the available data; returns title and file name of each."""
    drawn = []
    with matplotlib.rc_context(RC_PARAMS):
        for number, title, draw in (
            (1, "Accuracy against cost", cost_figure),
            (3, "kNN over the epochs", curves_figure),
            (4, "kNN against the size of the student", size_figure),
        ):
            figure, file = draw(comparison), f"figure{number}.png"
            (folder / file).unlink(missing_ok=True)  # of an earlier comparison
            if figure is not None:
                figure.savefig(folder / file, dpi=160)
                drawn.append((title, file))
    return drawn


def comparable_groups(comparison: Comparison, accuracy: str, *costs: str) -> Iterator[tuple[int, Group, Style]]:
    """Number, group and style of the groups that have an accuracy, on the images that most have it on, and these costs."""
    every = styles(comparison.groups)
    for number in comparison.comparable(accuracy):
        group = comparison.groups[number]
        if {*costs} <= group.measures.keys():
            yield number, group, every[number]


def families(comparison: Comparison) -> list[list[tuple[int, Group, Style]]]:
    """Groups with kNN and parameters that differ only in the student, smallest first."""
    found: dict[Any, list[tuple[int, Group, Style]]] = {}
    for number, group, style in comparable_groups(comparison, KNN.key, PARAMETERS.key):
        found.setdefault(group.family, []).append((number, group, style))
    return [sorted(members, key=lambda member: member[1].measures["parameters"].mean) for members in found.values()]


def family_name(members: Iterable[tuple[int, Group, Style]]) -> str:
    """Name of a family: its teachers, or the label of its first group."""
    (_, first, _), *_ = members
    return first.texts.get("teachers") or first.label


def cost_figure(comparison: Comparison) -> Figure | None:
    """A panel each for parameters and latency, if known; a line joins the groups on the Pareto front."""
    accuracy = comparison.main_accuracy
    costs = [cost for cost in comparison.costs if cost in ("parameters", "latency")] or comparison.costs[:1]
    if accuracy is None or not costs:
        return None
    figure = Figure(figsize=(4.2 * len(costs) + 2.4, 4.6), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    for panel, cost in zip(panels, costs, strict=True):
        line = []
        for number, group, style in comparable_groups(comparison, accuracy, cost):
            point = _point(panel, group, style, comparison.all_measures[cost], accuracy)
            if number in comparison.fronts.get((accuracy, cost), ()):
                line.append(point)
        if line:
            across, up = zip(*sorted(line), strict=True)
            panel.step(across, up, where="post", color="0.5", linewidth=1, linestyle="--", zorder=0)
        panel.set(xlabel=comparison.all_measures[cost].title)
    panels[0].set_ylabel(comparison.all_measures[accuracy].title)
    _legend(figure, panels[0])
    return figure


def curves_figure(comparison: Comparison) -> Figure | None:
    """kNN over the epochs: lines for averaged weights, dotted for raw ones, bands of one standard deviation."""
    drawn = [(group, style) for _, group, style in comparable_groups(comparison, KNN.key) if len(group.curve) > 1]
    if not drawn:
        return None
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    panel = figure.subplots()
    for group, style in drawn:
        points = [(point.epoch, point.knn) for point in group.curve if point.knn]
        epochs, means, spread = zip(*((x, knn.mean, knn.std or 0.0) for x, knn in points), strict=True)
        low, high = ([m + side * s for m, s in zip(means, spread, strict=True)] for side in (-1, 1))
        panel.fill_between(epochs, low, high, color=style.colour, alpha=0.15, linewidth=0)
        line: Any = {"color": style.colour, "marker": style.marker, "markersize": 4, "linewidth": 1.8}
        panel.plot(epochs, means, label=group.label, **line)
        raw = [(point.epoch, point.raw.mean) for point in group.curve if point.raw]
        panel.plot(*zip(*raw, strict=True), color=style.colour, linestyle=":", linewidth=1.0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="epoch", ylabel="kNN, % (line: averaged weights, dotted: raw)")
    _legend(figure, panel)
    return figure


def size_figure(comparison: Comparison) -> Figure | None:
    """One line per family: students that differ only in size, trained from one cache."""
    drawn = families(comparison)
    if not drawn:
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    panel = figure.subplots()
    for members in drawn:
        points = [_point(panel, group, style, PARAMETERS, KNN.key, label=False) for _, group, style in members]
        panel.plot(*zip(*points, strict=True), color=members[0][2].colour, linewidth=1.4, label=family_name(members))
        for at, (_, group, _) in zip(points, members, strict=True):
            name = group.texts.get("student", "")
            panel.annotate(name, at, xytext=(7, -10), textcoords="offset points", fontsize=7)
    panel.margins(x=0.15)
    panel.set(xlabel=PARAMETERS.title, ylabel=KNN.title)
    _legend(figure, panel)
    return figure


def _point(
    panel: Any, group: Group, style: Style, cost: Measure, accuracy: str, label: bool = True
) -> tuple[float, float]:
    x, y = group.measures[cost.key].mean / cost.scale, group.measures[accuracy]
    look = {"fmt": style.marker, "color": style.colour, "markersize": 7, "capsize": 2, "elinewidth": 1}
    panel.errorbar(x, y.mean, y.std, label=group.label if label else None, **look)
    return x, y.mean


def _legend(figure: Figure, panel: Any) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
