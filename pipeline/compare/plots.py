"""Figures 1, 3 and 4 of the ReGLA paper from the compared runs, as plotly traces and axes, ready for JSON.

The page sets the colours of text and grid; `figures.py` draws the same plots as PNG files.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from pipeline.compare.comparison import Comparison, format_summary
from pipeline.compare.group import Group, Summary
from pipeline.compare.measures import KNN, PARAMETERS, Measure
from pipeline.report.chart import COLOURS

T = TypeVar("T")
Plot = dict[str, Any]
Trace = dict[str, Any]

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross")
LOG_FROM = 5.0
"""The axis is logarithmic if the ratio of the largest to the smallest cost exceeds this."""

TICKS = 12
"""Labelled epochs on the axis, at most."""


@dataclass(frozen=True)
class Style:
    """How a group is drawn: the colour and the symbol of its markers."""

    colour: str
    symbol: str


def styles(groups: Sequence[Group]) -> list[Style]:
    """Colour by teachers and marker by student if that distinguishes all groups; otherwise a style per group."""
    teachers = [group.texts.get("teachers", "") for group in groups]
    students = [group.texts.get("student", "") for group in groups]
    if len(set(teachers)) == 1:
        teachers, students = students, teachers
    if len(set(zip(teachers, students, strict=True))) < len(groups):
        teachers, students = [group.label for group in groups], [""] * len(groups)
    return [
        Style(_pick(COLOURS, teachers, teacher), _pick(SYMBOLS, students, student))
        for teacher, student in zip(teachers, students, strict=True)
    ]


def _pick(values: Sequence[T], names: Sequence[str], name: str) -> T:
    return values[list(dict.fromkeys(names)).index(name) % len(values)]


def comparable_groups(
    comparison: Comparison, images: str | None, accuracy: str, *costs: str
) -> Iterator[tuple[int, Group, Style]]:
    """Number, group and style of the groups that have an accuracy on these images, and these costs."""
    every = styles(comparison.groups)
    for number in comparison.by_images(accuracy).get(images, []):
        group = comparison.groups[number]
        if {*costs} <= group.measures.keys():
            yield number, group, every[number]


def families(comparison: Comparison, images: str | None) -> list[list[tuple[int, Group, Style]]]:
    """Groups with kNN on these images, and parameters, that differ only in the student, smallest first."""
    found: dict[Any, list[tuple[int, Group, Style]]] = {}
    for number, group, style in comparable_groups(comparison, images, KNN.key, PARAMETERS.key):
        found.setdefault(group.family, []).append((number, group, style))
    return [sorted(members, key=lambda member: member[1].measures["parameters"].mean) for members in found.values()]


def cost_plots(comparison: Comparison, images: str | None) -> dict[str, dict[str, Plot]]:
    """Plots by accuracy and cost, of the groups that were measured on these images."""
    return {
        accuracy: {cost: cost_plot(comparison, images, accuracy, cost) for cost in comparison.costs}
        for accuracy in comparison.accuracies
    }


def cost_plot(comparison: Comparison, images: str | None, accuracy: str, cost: str) -> Plot:
    """An accuracy against a cost; a line joins the groups on the Pareto front. Of groups at one place, all can be seen."""
    front = comparison.fronts.get((accuracy, cost), set())
    measures = comparison.all_measures
    x, y, others = measures[cost], measures[accuracy], [measures[key] for key in comparison.costs]
    traces, line = [], []
    places: list[tuple[float, float]] = []
    for number, group, style in comparable_groups(comparison, images, accuracy, cost):
        trace = _point(number, group, style, (x, y), others)
        traces.append(trace)
        at = trace["x"][0], trace["y"][0]
        if number in front:
            trace["marker"] |= {"size": 14, "line": {"width": 2}}
            line.append(at)
        if alike := places.count(at):
            trace["marker"] |= {"size": trace["marker"]["size"] + 7 * alike, "symbol": f"{style.symbol}-open"}
            trace["marker"]["line"] = {"width": 2}
        places.append(at)
    costs = [trace["x"][0] for trace in traces]
    kind = "log" if costs and min(costs) > 0 and max(costs) / min(costs) > LOG_FROM else "linear"
    joined = _line("Pareto front", sorted(line), "front", shape="hv", width=1.5, dash="dash")
    return _plot([joined, *traces], x.title, y.title, kind)


def curves_plot(comparison: Comparison, images: str | None) -> Plot:
    """kNN over the epochs: lines for averaged weights, dotted for raw ones, dashed for teachers, bands of one standard
    deviation.
    """
    drawn = [member for member in comparable_groups(comparison, images, KNN.key) if len(member[1].curve) > 1]
    title = f"{KNN.title}; dotted: raw weights"
    epochs = max((point.epoch for _, group, _ in drawn for point in group.curve), default=0)
    traces = [trace for member in drawn for trace in _curves(*member)]
    plot = _plot([*traces, *_teachers([(number, group) for number, group, _ in drawn], epochs)], "epoch", title)
    plot["layout"]["xaxis"]["dtick"] = max(1, ceil(epochs / TICKS))
    return plot


def _curves(number: int, group: Group, style: Style) -> Iterator[Trace]:
    averaged = [(point.epoch, point.knn) for point in group.curve if point.knn]
    raw = [(point.epoch, point.raw) for point in group.curve if point.raw]
    if spread := [(epoch, knn.mean, knn.std) for epoch, knn in averaged if knn.std]:
        outline = [(epoch, mean + std) for epoch, mean, std in spread]
        outline += [(epoch, mean - std) for epoch, mean, std in reversed(spread)]
        yield {
            **_named(number, group, "band"),
            "mode": "lines",
            "x": [epoch for epoch, _ in outline],
            "y": [knn for _, knn in outline],
            "fill": "toself",
            "fillcolor": f"{style.colour}26",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    if raw:
        line = {"color": style.colour, "width": 1.4, "dash": "dot"}
        yield {**_curve(number, group, "raw", "raw weights", raw), "mode": "lines", "line": line, "showlegend": False}
    yield {
        **_curve(number, group, "average", "averaged weights", averaged),
        "mode": "lines+markers",
        "line": {"color": style.colour, "width": 2.4},
        "marker": {"symbol": style.symbol, "size": 6},
    }


def _curve(number: int, group: Group, role: str, weights: str, points: Sequence[tuple[float, Summary]]) -> Trace:
    return {
        **_named(number, group, role),
        "x": [epoch for epoch, _ in points],
        "y": [knn.mean for _, knn in points],
        "text": [
            f"<b>{_escape(group.label)}</b><br>epoch {epoch:g}, {weights}<br>"
            f"kNN {format_summary(knn, KNN)} % ({seeds(knn.n)})"
            for epoch, knn in points
        ],
    }


def _teachers(groups: Sequence[tuple[int, Group]], epochs: float) -> Iterator[Trace]:
    """A line for each teacher, or several where its kNN differs, with the groups that have learned from it."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, group in groups:
        for name, knn in group.teacher_knn.items():
            found.setdefault((name, KNN.show(knn)), []).append(number)
    for order, ((name, shown), numbers) in enumerate(found.items()):
        colour = COLOURS[-1 - order % len(COLOURS)]
        points = [(0.0, float(shown)), (epochs, float(shown))]
        line = _line(f"teacher {name}: {shown} %", points, "teacher", color=colour, width=1.3, dash="dash")
        line["meta"]["groups"] = numbers
        yield line


def size_plot(comparison: Comparison, images: str | None) -> Plot:
    """kNN against the parameters; a line each for students that differ only in size, trained from one cache."""
    traces = []
    for members in families(comparison, images):
        points = [_point(*member, (PARAMETERS, KNN), ()) for member in members]
        line = [(point["x"][0], point["y"][0]) for point in points]
        _, first, style = members[0]
        joined = _line(first.texts.get("teachers") or first.label, line, "family", color=style.colour, width=2)
        joined["meta"]["groups"] = [number for number, _, _ in members]
        traces += [joined, *(point | {"showlegend": len(members) == 1} for point in points)]
    return _plot(traces, PARAMETERS.title, KNN.title)


def _named(number: int, group: Group, role: str) -> Trace:
    return {
        "type": "scatter",
        "name": _escape(group.label),
        "legendgroup": str(number),
        "hovertemplate": "%{text}<extra></extra>",
        "meta": {"role": role, "groups": [number], "student": group.texts.get("student", "")},
    }


def _point(number: int, group: Group, style: Style, axes: tuple[Measure, Measure], others: Sequence[Measure]) -> Trace:
    """A group at its means, with the standard deviation of the second measure; hovering also shows the others."""
    x, y = axes
    known = [measure for measure in dict.fromkeys([y, x, *others]) if measure.key in group.measures]
    lines = [f"{m.label} {format_summary(group.measures[m.key], m)} {m.unit}" for m in known]
    std = group.measures[y.key].std
    return {
        **_named(number, group, "point"),
        "mode": "markers",
        "x": [group.measures[x.key].mean / x.scale],
        "y": [group.measures[y.key].mean],
        "error_y": {"type": "data", "array": [std or 0], "visible": bool(std), "thickness": 1.2, "width": 4},
        "text": ["<br>".join([f"<b>{_escape(group.label)}</b>", *lines, seeds(len(group.counted))])],
        "marker": {"symbol": style.symbol, "color": style.colour, "size": 11, "line": {"width": 0}},
    }


def _line(name: str, points: Sequence[tuple[float, float]], role: str, **line: Any) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _escape(name),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": line,
        "hoverinfo": "skip",
        "showlegend": len(points) > 1,
        "meta": {"role": role, "groups": []},
    }


def _plot(traces: Sequence[Trace], x: str, y: str, kind: str = "linear") -> Plot:
    axes = {"xaxis": {"title": {"text": x}, "type": kind}, "yaxis": {"title": {"text": y}}}
    return {"data": list(traces), "layout": axes}


def seeds(count: int) -> str:
    """Number of seeds in words."""
    return "1 seed" if count == 1 else f"{count} seeds"


def _escape(text: str) -> str:
    """Escape text for names and hovers, in which plotly interprets some HTML."""
    return html.escape(text, quote=False)
