"""Line charts as SVG, which a page shows without scripts: sharp at any size, coloured by the page's style."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COLOURS = ("#3b6fd4", "#d9622b", "#2a9d63", "#a55ad6", "#c2417c", "#1a97a6", "#9a7b1f", "#6b7280")
"""Distinguishable on white and on black, with a contrast of at least 3 to both."""

WIDTH, HEIGHT = 420.0, 260.0
RIGHT, TOP, BOTTOM = 10.0, 10.0, 34.0
"""Margins around the axes; the left one suits the labels."""
LEAST_LEFT, PER_CHARACTER = 46.0, 7.2
"""Least left margin, and width of a character of its labels, in the page's font."""
MOST_POINTS = 400
"""Points of a longer line are thinned evenly; its last one stays."""
MOST_MARKERS = 32
"""Longer lines have no markers."""

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """A curve, or a constant.

    Attributes:
        points: (x, y), by x.
        band: (x, low, high), by x: the uncertainty of each point.
        dashed: whether it is drawn dashed, as constants are.
        last: how the legend shows its last value.
    """

    name: str
    points: Points
    band: tuple[tuple[float, float, float], ...] = ()
    dashed: bool = False
    last: str = ""


class Tick(NamedTuple):
    """A label of an axis and its place in pixels."""

    at: float
    text: str


class Marker(NamedTuple):
    """A point in pixels with its values."""

    at_x: float
    at_y: float
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes, with a caption that says what they are."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    caption: str = ""

    def colour(self, number: int) -> str:
        """The colour of a line."""
        return COLOURS[number % len(COLOURS)]

    @property
    def x_ticks(self) -> list[Tick]:
        """Labels below the axes."""
        low, high = self._x_range
        return [Tick(self._across(value), f"{value:g}") for value in _ticks(low, high, integer=high - low >= 2)]

    @property
    def y_ticks(self) -> list[Tick]:
        """Labels beside the axes."""
        return [Tick(self._down(value), f"{value:.6g}") for value in _ticks(*self._y_range)]

    @cached_property
    def left(self) -> float:
        """Left margin in pixels, which holds the labels beside the axes."""
        return max([LEAST_LEFT, *(12 + PER_CHARACTER * len(tick.text) for tick in self.y_ticks)])

    def path(self, line: Line) -> str:
        """The points of a line for an SVG polyline."""
        return _joined((self._across(x), self._down(y)) for x, y in thinned(line.points))

    def outline(self, line: Line) -> str:
        """The band of a line for an SVG polygon."""
        upper = [(x, high) for x, _, high in line.band]
        lower = [(x, low) for x, low, _ in reversed(line.band)]
        return _joined((self._across(x), self._down(y)) for x, y in (*upper, *lower))

    def markers(self, line: Line) -> list[Marker]:
        """The points of a short line."""
        if line.dashed or len(line.points) > MOST_MARKERS:
            return []
        return [Marker(self._across(x), self._down(y), x, y) for x, y in line.points]

    @cached_property
    def _x_range(self) -> tuple[float, float]:
        xs = [x for line in self.lines for x, _ in line.points]
        low, high = min(xs), max(xs)
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    @cached_property
    def _y_range(self) -> tuple[float, float]:
        ys = [y for line in self.lines for _, y in line.points]
        ys += [y for line in self.lines for _, low, high in line.band for y in (low, high)]
        low, high = min(ys), max(ys)
        if low == high == 0:
            return 0.0, 1.0
        margin = 0.04 * (high - low) if low < high else abs(low) / 10
        return low - margin, high + margin

    def _across(self, x: float) -> float:
        low, high = self._x_range
        return self.left + (WIDTH - self.left - RIGHT) * (x - low) / (high - low)

    def _down(self, y: float) -> float:
        low, high = self._y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)


def thinned(points: Points) -> Points:
    """At most about `MOST_POINTS` points, evenly chosen, among them the last one."""
    step = -(-len(points) // MOST_POINTS)
    return points[(len(points) - 1) % step :: step] if points else points


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(low: float, high: float, integer: bool = False) -> Sequence[float]:
    from matplotlib.ticker import MaxNLocator  # a job that has just started has no chart yet

    found = MaxNLocator(nbins=5, integer=integer).tick_values(low, high)
    return [float(value) for value in found if low <= value <= high]
