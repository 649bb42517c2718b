"""The page: one self-contained HTML file with style, scripts, plotly and figures, which loads nothing."""

from collections import Counter
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.compare.collect import Entry
from pipeline.compare.comparison import Comparison, format_summary
from pipeline.compare.group import Group
from pipeline.compare.notes import notes
from pipeline.compare.plots import cost_plots, curves_plot, seeds, size_plot
from pipeline.compare.significance import statement
from pipeline.compare.tables import common
from pipeline.report.html import environment, policy, style, to_json

PAGE = Path(__file__).with_name("page")


def render_page(comparison: Comparison) -> str:
    """The whole page; names, tags and parameters are escaped."""
    scripts = [Markup(text) for text in (get_plotlyjs(), (PAGE / "page.js").read_text(encoding="utf-8"))]
    sets = comparison.image_sets
    plots = [
        {"cost": cost_plots(comparison, s), "curves": curves_plot(comparison, s), "size": size_plot(comparison, s)}
        for s in sets
    ]
    groups, all_measures = comparison.groups, comparison.all_measures
    pairs = {
        f"{d.measure} {d.first} {d.second}": statement(d, groups, all_measures[d.measure])
        for d in comparison.differences
    }
    images = {
        key: [comparison.named(group.held_out) if key in group.measures else None for group in groups]
        for key in comparison.accuracies
    }
    template = environment(PAGE).get_template("page.html")
    return template.render(
        comparison=comparison,
        common=common(comparison),
        measures=comparison.measures,
        accuracies=[measure for measure in comparison.measures if measure.better == "higher"],
        others=[measure for measure in comparison.measures if measure.better != "higher"],
        all_measures=all_measures,
        format_summary=format_summary,
        seeds=seeds,
        sparkline=sparkline,
        most_common=most_common(comparison),
        cheapest=cheapest(comparison),
        day=lambda entry: datetime.fromtimestamp(entry.started / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes(comparison),
        css=style(PAGE / "page.css"),
        scripts=scripts,
        policy=policy(scripts),
        sets=sets,
        first_set=sets.index(comparison.main_images(comparison.main_accuracy or "")) if comparison.main_accuracy else 0,
        has_curves=any(plot["curves"]["data"] for plot in plots),
        has_sizes=any(plot["size"]["data"] for plot in plots),
        data=to_json({"plots": plots, "pairs": pairs, "images": images}),
    )


def cheapest(comparison: Comparison) -> dict[str, Group]:
    """By parameters and latency, the cheapest group on the front, unless it is also the most accurate one."""
    key, best = comparison.main_accuracy or "", set(chain.from_iterable(comparison.best.values()))
    found: dict[str, Group] = {}
    for cost in ("parameters", "latency"):
        front = comparison.fronts.get((key, cost), set())
        on_front = {number: comparison.groups[number] for number in front.intersection(comparison.comparable(key))}
        if on_front:
            number, group = min(on_front.items(), key=lambda item: item[1].measures[cost].mean)
            found |= {cost: group} if number not in best else {}
    return found


def most_common(comparison: Comparison) -> dict[str, str | None]:
    """Most common value of every field in which the groups differ; None if each group has its own."""
    found: dict[str, str | None] = {}
    for key in comparison.changed:
        ((value, count), *_) = Counter(group.config.get(key) for group in comparison.groups).most_common()
        found[key] = value if count > 1 else None
    return found


def sparkline(entry: Entry) -> str:
    """Points of the kNN curve of averaged weights for an SVG polyline; "" if there are fewer than two."""
    points = [(point.epoch, point.knn) for point in entry.curve if point.knn is not None]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, spread = max(x for x, _ in points) or 1.0, (high - low) or 1.0
    # The page draws it 64 by 18 pixels large, with a margin of 2.
    return " ".join(f"{2 + 60 * x / last:.1f},{2 + 14 * (1 - (y - low) / spread):.1f}" for x, y in points)
