"""Figures on different images in every output: named, and never compared."""

import json
import re
from dataclasses import replace

import pytest

from pipeline.compare.comparison import Comparison
from pipeline.compare.html import cheapest, render_page
from pipeline.compare.measures import measures_of
from pipeline.compare.notes import notes
from pipeline.compare.plots import comparable_groups, cost_plot
from pipeline.compare.tables import (
    differences_frame,
    groups_frame,
    groups_table,
    render_markdown,
    render_text,
    runs_frame,
    runs_table,
)
from pipeline.errors import UserError
from pipeline.tracking.reading import read_experiment
from tests.compare.experiments import FLOWERS, entry


def compare(*rows):
    places = {"photos": "data/photos", "others": "data/others"}
    return Comparison(rows, None, {}, measures_of([]), places, "a", "sqlite:///a", "")


@pytest.fixture
def mixed():
    """kNN of most on the same images, linear on two sets of them."""
    return compare(
        entry("small", 0, knn=20.0, linear=60.0, parameters=2e6),
        entry("small", 1, knn=21.0, parameters=2e6),
        entry("small", 1, linear=30.0, parameters=2e6, held_out="others"),
        entry("middle", 1, knn=30.0, linear=50.0, parameters=4e6),
        entry("large", 1, knn=31.0, parameters=8e6),
        entry("large", 1, linear=40.0, parameters=8e6, held_out="others"),
        entry("foreign", 2, knn=99.0, parameters=1e6, held_out="others"),
        entry("broken", 3, knn=98.0, status="failed"),
    )


def test_no_row_holds_figures_on_different_images_and_every_row_names_them(mixed):
    table = groups_table(mixed)
    name, images, linear = (table[0].index(title) for title in ("group", "held out", "linear, %"))
    assert [(row[name], row[images], row[linear]) for row in table[1:]] == [
        ("small", "photos", "60.0"),
        ("small #2", "others", "30.0"),
        ("middle", "photos", "50.0"),
        ("large", "photos", ""),
        ("large #2", "others", "40.0"),
        ("foreign", "others", ""),
    ]
    runs = runs_table(mixed)
    assert [row[1] for row in runs] == [
        "held out",
        *["photos"] * 2,
        "others",
        *["photos"] * 2,
        *["others"] * 2,
        "photos",
    ]
    for text in (render_text(mixed), render_markdown(mixed, [])):
        assert "held out" in text
    same = compare(entry("a", knn=1.0), entry("b", knn=2.0))
    assert "held out" not in groups_table(same)[0]
    assert "All accuracies were measured on photos (data/photos)." in notes(same)
    assert not [note for note in notes(mixed) if note.startswith("All accuracies")]


def test_the_page_shows_one_set_of_images_at_a_time_and_names_them(mixed):
    page = render_page(mixed)
    options = re.findall(r'<option value="(\d)"( selected)?>([^<]*)</option>', page.partition('id="images">')[2])[:2]
    assert options == [("0", " selected", "photos (data/photos)"), ("1", "", "others (data/others)")]
    groups = page.partition('id="table-groups"')[2].partition("</table>")[0]
    assert re.findall(r'data-images="(\d)"', groups) == ["0", "1", "0", "0", "1", "1"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    drawn = [
        [trace["name"] for trace in plots["cost"]["knn"]["parameters"]["data"] if trace["meta"]["groups"]]
        for plots in data["plots"]
    ]
    assert drawn == [["small", "middle", "large"], ["foreign"]]
    assert "Best kNN on photos (data/photos)" in page


def test_runs_are_linked_with_their_reports():
    rows = [entry("a", knn=1.0), replace(entry("b", knn=2.0), report="file:///runs/b/report.html")]
    page = render_page(compare(*rows))
    assert re.findall(r'class="report" href="([^"]*)"', page) == ["file:///runs/b/report.html"]


def test_groups_that_tie_are_all_named_and_all_to_be_seen():
    rows = [entry(name, knn=knn, parameters=2e6) for name, knn in (("a", 30.01), ("b", 30.04), ("c", 20.0))]
    found = compare(*rows, entry("d", knn=30.04, parameters=2e6))
    assert found.best == {"photos": [0, 1, 3]}
    page = render_page(found)
    assert "Best kNN, a tie of 3 on photos (data/photos)" in page
    assert "a<br>b<br>d" in page
    assert len(re.findall(r'class="number best"', page)) == 3
    points = [trace for trace in cost_plot(found, "photos", "knn", "parameters")["data"] if trace["meta"]["groups"]]
    shown = {trace["name"]: (trace["marker"]["symbol"].endswith("-open"), trace["marker"]["size"]) for trace in points}
    assert (shown["b"][0], shown["d"][0]) == (False, True)
    assert shown["d"][1] > shown["b"][1]


def test_the_notes_say_what_was_measured_where_and_what_is_left_out(mixed):
    told = notes(mixed)
    assert (
        "kNN was measured on different held-out images, and only groups on the same ones are compared: "
        "3 groups on photos (data/photos); foreign on others (data/others)." in told
    )
    assert (
        "linear was measured on different held-out images, and only groups on the same ones are compared: "
        "2 groups on photos (data/photos); small #2, large #2 on others (data/others)." in told
    )
    assert "Unfinished, and not counted: broken-3." in told


def test_best_front_and_figures_hold_what_is_comparable_alone(mixed):
    labels = [group.label for group in mixed.groups]
    assert labels == ["small", "small #2", "middle", "large", "large #2", "foreign"]
    assert mixed.main_accuracy == "knn"
    best = {images: [labels[number] for number in numbers] for images, numbers in mixed.best.items()}
    assert best == {"photos": ["large"], "others": ["foreign"]}
    drawn = [group.label for _, group, _ in comparable_groups(mixed, "photos", "knn", "parameters")]
    assert drawn == ["small", "middle", "large"]
    assert [group.label for _, group, _ in comparable_groups(mixed, "others", "linear")] == ["small #2", "large #2"]
    assert cheapest(mixed)["parameters"].label == "small"


def test_tables_for_machines_name_the_images_of_each_row(mixed):
    runs = runs_frame(mixed)
    assert runs[["name", "held_out"]].to_numpy().tolist()[:3] == [
        ["small-0", "photos"],
        ["small-1", "photos"],
        ["small-1", "others"],
    ]
    assert runs.set_index("name")["group"].isna().to_dict()["broken-3"]
    assert groups_frame(mixed)["held_out"].tolist() == ["photos", "others", "photos", "photos", "others", "others"]
    found = differences_frame(mixed)[["measure", "first", "second", "held_out"]].to_numpy().tolist()
    assert ["linear", "small #2", "large #2", "others"] in found
    assert ["linear", "small", "middle", "photos"] in found
    assert len([row for row in found if row[0] == "linear"]) == 2


def selected(page, control):
    options = re.search(rf'<select id="{control}">(.*?)</select>', page)[1]
    return re.search(r"selected>([^<]*)<", options)[1]


def test_the_page_starts_with_the_best_two_on_the_same_images(mixed):
    page = render_page(mixed)
    assert {selected(page, f"pair-{part}") for part in ("first", "second")} == {"middle", "large"}
    assert selected(page, "pair-measure") == "kNN"


def test_the_page_starts_with_any_pair_that_can_be_compared():
    rows = [entry("a", knn=1.0, held_out="1"), entry("b", knn=2.0, linear=1.0, held_out="2"), entry("c", knn=3.0)]
    found = compare(*rows, entry("d", linear=2.0, held_out="2"))
    page = render_page(found)
    assert (selected(page, "pair-first"), selected(page, "pair-second")) == ("b", "d")
    assert selected(page, "pair-measure") == "linear"
    assert '"images": {"knn": ["1", "2", "photos (data/photos)", null]' in page
    assert 'id="pair-first"' not in render_page(compare(*rows))


@pytest.mark.parametrize("filter_string", ["", "tags.job = 'distill'"])
def test_an_experiment_without_a_finished_run_is_one_line(store, filter_string):
    for seed, status in enumerate(("FAILED", "RUNNING", "FAILED")):
        store.distil("regla_t", ["hog"], seed, 20.0, status=status)
    where = "--filter: it leaves" if filter_string else "--experiment: there is"
    with pytest.raises(UserError) as error:
        Comparison.of(read_experiment(store.uri, store.experiment, filter_string), filter_string)
    expected = f"{where} no finished run of {store.experiment} to compare; there are only: 2 failed, 1 running"
    assert str(error.value) == expected


def test_seeds_that_were_judged_on_other_images_form_a_group_of_their_own(store):
    for seed in (0, 1):
        run = store.distil("regla_t", ["hog"], seed, 20.0 + seed)
        store.judge("knn", run.run_id, {"knn": 70.0 + seed}, val=FLOWERS)
    found = Comparison.of(read_experiment(store.uri, store.experiment))
    figures = {group.label: (group.measures["knn"].mean, group.measures["knn"].n) for group in found.groups}
    assert figures == {
        "regla_t · val=cifar-val-33334444": (20.5, 2),
        "regla_t · val=flowers-val-aaaabbbb": (70.5, 2),
    }
    assert found.differences == []
