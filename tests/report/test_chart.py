from itertools import pairwise

import pytest

from pipeline.report.chart import BOTTOM, HEIGHT, MOST_POINTS, RIGHT, TOP, WIDTH, Chart, Line, thinned


def places(path):
    return [tuple(float(value) for value in point.split(",")) for point in path.split()]


def test_points_lie_within_the_axes_in_proportion():
    line = Line("a", ((0.0, 10.0), (1.0, 20.0), (4.0, 30.0)), band=((0.0, 5.0, 15.0), (4.0, 25.0, 35.0)))
    chart = Chart("t", "epoch", "kNN", (line,))
    (x0, y0), (x1, y1), (x2, y2) = places(chart.path(line))
    assert (x0, x2) == (chart.left, WIDTH - RIGHT)
    assert x1 - x0 == pytest.approx((x2 - x0) / 4, abs=0.1)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    around = places(chart.outline(line))
    assert len(around) == 4
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in around)
    assert [tick.text for tick in chart.x_ticks] == ["0", "1", "2", "3", "4"]
    assert [(marker.x, marker.y) for marker in chart.markers(line)] == [*line.points]


@pytest.mark.parametrize("points", [((0.0, 5.0),), ((0.0, 5.0), (3.0, 5.0)), ((2.0, -1e-9), (2.0, 1e9))])
def test_a_point_a_constant_and_an_extreme_are_drawn(points):
    line = Line("a", points)
    chart = Chart("t", "x", "y", (line,))
    assert all(chart.left <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places(chart.path(line)))
    assert chart.x_ticks
    assert chart.y_ticks


def test_a_long_line_is_thinned_to_its_last_point_and_has_no_markers():
    points = tuple((float(number), 0.0) for number in range(1501))
    kept = thinned(points)
    assert MOST_POINTS / 2 < len(kept) <= MOST_POINTS
    assert kept[-1] == points[-1]
    assert len({round(b[0] - a[0]) for a, b in pairwise(kept)}) == 1
    assert Chart("t", "x", "y", (Line("a", points),)).markers(Line("a", points)) == []
    assert thinned(()) == ()


@pytest.mark.parametrize("top", [1.6e-05, 0.0061, 1.0, 123456.0])
def test_labels_beside_the_axes_have_room(top):
    chart = Chart("t", "x", "y", (Line("a", ((0.0, 0.0), (1.0, top))),))
    longest = max(len(tick.text) for tick in chart.y_ticks)
    assert chart.left - 6 >= 7 * longest  # of 12 px, a digit of the widest usual font takes 7


def test_of_zeros_the_axis_ends_at_zero():
    chart = Chart("t", "x", "y", (Line("a", ((0.0, 0.0), (1.0, 0.0))),))
    assert [float(tick.text) for tick in chart.y_ticks] == [0, 0.2, 0.4, 0.6, 0.8, 1]
