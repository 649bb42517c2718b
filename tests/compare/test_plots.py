import re
from dataclasses import replace

import pytest

from pipeline.compare.collect import Point
from pipeline.compare.comparison import Comparison
from pipeline.compare.figures import write_figures
from pipeline.compare.group import group
from pipeline.compare.html import most_common, render_page
from pipeline.compare.measures import measures_of
from pipeline.compare.notes import notes
from pipeline.compare.plots import cost_plots, curves_plot, size_plot, styles
from tests.compare.experiments import entry

MARKUP = "</script><b>$x_1$</b>&amp;"


def compare(*rows):
    return Comparison(rows, None, {}, measures_of([]), {}, "a", "sqlite:///a", "")


def test_points_are_in_the_units_of_the_axis_and_the_front_joins_the_best():
    found = compare(
        entry("small", 0, knn=20.0, parameters=2e6),
        entry("small", 1, knn=22.0, parameters=2e6),
        entry("large", 0, knn=30.0, parameters=20e6),
        entry("worse", 0, knn=10.0, parameters=30e6),
    )
    plot = cost_plots(found, "photos")["knn"]["parameters"]
    joined, small, large, worse = plot["data"]
    assert (joined["x"], joined["y"]) == ([2.0, 20.0], [21.0, 30.0])
    assert (small["x"], small["y"], small["error_y"]["array"]) == ([2.0], [21.0], [pytest.approx(2**0.5)])
    assert (large["error_y"]["visible"], worse["error_y"]["visible"]) == (False, False)
    assert [trace["marker"]["size"] for trace in (small, large, worse)] == [14, 14, 11]
    assert plot["layout"]["xaxis"] == {"title": {"text": "parameters, M"}, "type": "log"}


def test_a_line_joins_students_of_one_cache_in_the_order_of_their_size():
    found = compare(
        entry("large", knn=30.0, parameters=9e6, config={"cache.codec": "int8"}),
        entry("small", knn=20.0, parameters=2e6, config={"cache.codec": "int8"}),
        entry("other", knn=25.0, parameters=4e6, config={"cache.codec": "float16"}),
    )
    lines = [trace for trace in size_plot(found, "photos")["data"] if trace["meta"]["role"] == "family"]
    assert [line["x"] for line in lines] == [[2.0, 9.0], [4.0]]
    assert lines[0]["meta"]["groups"] == [1, 0]


def test_the_knn_of_teachers_is_a_line_each_over_the_epochs():
    curve = (Point(0.0, 10.0, 10.0), Point(4.0, 20.0, None))
    rows = [entry(name, knn=20.0, curve=curve) for name in "abc"]
    known = ({"hog": 31.04}, {"hog": 31.02, "sam": 40.0}, {"hog": 33.0})
    found = compare(*(replace(row, teacher_knn=teachers) for row, teachers in zip(rows, known, strict=True)))
    lines = [trace for trace in curves_plot(found, "photos")["data"] if trace["meta"]["role"] == "teacher"]
    assert [(line["name"], line["x"], line["y"], line["meta"]["groups"]) for line in lines] == [
        ("teacher hog: 31.0 %", [0.0, 4.0], [31.0, 31.0], [0, 1]),
        ("teacher sam: 40.0 %", [0.0, 4.0], [40.0, 40.0], [1]),
        ("teacher hog: 33.0 %", [0.0, 4.0], [33.0, 33.0], [2]),
    ]
    assert {line["line"]["dash"] for line in lines} == {"dash"}


def test_only_groups_on_the_same_images_are_drawn_together(tmp_path):
    rows = [entry(name, knn=20.0, parameters=2e6) for name in "ab"]
    found = compare(*rows, entry("c", knn=90.0, parameters=1e6, held_out="others"))
    names = [
        trace["name"] for trace in cost_plots(found, "photos")["knn"]["parameters"]["data"] if trace["meta"]["groups"]
    ]
    assert names == ["a", "b"]
    assert any("different held-out images" in note for note in notes(found))
    assert [file for _, file in write_figures(found, tmp_path)] == ["figure1.png", "figure4.png"]
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_markup_in_a_name_is_text_in_plots_figures_and_page(tmp_path):
    found = compare(entry(MARKUP, knn=20.0, parameters=2e6), entry("plain", knn=21.0, parameters=3e6))
    point = cost_plots(found, "photos")["knn"]["parameters"]["data"][1]
    assert point["name"] == "&lt;/script&gt;&lt;b&gt;$x_1$&lt;/b&gt;&amp;amp;"
    assert MARKUP not in point["text"][0]
    assert len(write_figures(found, tmp_path)) == 2
    page = render_page(found)
    assert len(re.findall("</script>", page)) == 3
    assert "<b>$x_1$" not in page
    assert curves_plot(found, "photos")["data"] == []


def test_colours_tell_teachers_and_markers_students_or_each_group_its_own():
    rows = [entry(name, knn=1.0, config={"teachers.0.model": name}) for name in ("a", "b")]
    one, other = styles(group(rows))
    assert one.colour != other.colour
    same = group([entry("a", config={"train.lr": value}) for value in "12345"])
    assert len({style.colour for style in styles(same)}) == 5


def test_the_usual_value_is_the_one_that_the_most_groups_have():
    rows = [entry("a", config={"train.lr": lr, "train.epochs": e}) for lr, e in (("1", "1"), ("1", "2"), ("2", "3"))]
    assert most_common(compare(*rows)) == {"train.epochs": None, "train.lr": "1"}
