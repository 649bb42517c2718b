"""Figures on different images in every output: named, and never compared."""

import re

import pytest

from pipeline.compare.comparison import Comparison
from pipeline.compare.html import cheapest, render_page
from pipeline.compare.measures import measures_of
from pipeline.compare.notes import notes
from pipeline.compare.plots import comparable_groups
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
    """kNN of all on the same images, linear on two sets of them."""
    return compare(
        entry("small", 0, knn=20.0, linear=60.0, parameters=2e6),
        entry("small", 1, knn=21.0, linear=30.0, parameters=2e6, measured_on={"linear": "others"}),
        entry("middle", 1, knn=30.0, linear=50.0, parameters=4e6),
        entry("large", 1, knn=31.0, linear=40.0, parameters=8e6, measured_on={"linear": "others"}),
        entry("foreign", 2, knn=99.0, parameters=1e6, held_out="others"),
        entry("broken", 3, knn=98.0, status="failed"),
    )


def test_a_figure_on_other_images_is_marked_and_the_mark_explained(mixed):
    table = {row[0]: row for row in groups_table(mixed)}
    at = table["group"].index("linear, %")
    assert [table[name][at] for name in ("small", "middle", "large")] == ["30.0 [1]", "50.0", "40.0 [1]"]
    runs = {row[0]: row for row in runs_table(mixed)}
    at = runs["run"].index("linear, %")
    assert [runs[name][at] for name in ("small-0", "small-1", "broken-3")] == ["60.0", "30.0 [1]", ""]
    told = notes(mixed)
    assert "[1] Measured on others (data/others)." in told
    assert (
        "Without a mark: measured on the held-out images of the run, photos (data/photos) or others (data/others)."
        in told
    )
    for text in (render_text(mixed), render_page(mixed)):
        assert "[1] Measured on others (data/others)." in text
    assert "30.0 \\[1\\]" in render_markdown(mixed, [])
    assert 'title="measured on others (data/others)">[1]</span>' in render_page(mixed)


def test_the_notes_say_what_was_measured_where_and_what_is_left_out(mixed):
    told = notes(mixed)
    assert (
        "kNN was measured on different held-out images, and only groups on the same ones are compared: "
        "3 groups on photos (data/photos); foreign on others (data/others)." in told
    )
    assert (
        "linear was measured on different held-out images, and only groups on the same ones are compared: "
        "2 groups on others (data/others); middle on photos (data/photos)." in told
    )
    assert "linear of small is that on others (data/others); 1 seed was measured on other images and left out." in told
    assert "Unfinished, and not counted: broken-3." in told


def test_best_front_and_figures_hold_what_is_comparable_alone(mixed):
    labels = [group.label for group in mixed.groups]
    assert labels == ["small", "middle", "large", "foreign"]
    assert mixed.main_accuracy == "knn"
    assert {images: labels[number] for images, number in mixed.best.items()} == {"photos": "large", "others": "foreign"}
    assert [group.label for _, group, _ in comparable_groups(mixed, "knn", "parameters")] == labels[:3]
    assert [group.label for _, group, _ in comparable_groups(mixed, "linear")] == ["small", "large"]
    assert cheapest(mixed)["parameters"].label == "small"


def test_tables_for_machines_name_the_images_of_each_figure(mixed):
    runs = runs_frame(mixed).set_index("name")
    assert runs.loc["small-1", ["held_out", "linear_held_out"]].tolist() == ["photos", "others"]
    assert runs.loc["small-0", "linear_held_out"] == "photos"
    assert "knn_held_out" not in runs
    assert runs["group"].isna().to_dict()["broken-3"]
    groups = groups_frame(mixed).set_index("group")
    assert groups["linear_held_out"].fillna("").to_dict() == {
        "small": "others",
        "middle": "photos",
        "large": "others",
        "foreign": "",
    }
    found = differences_frame(mixed)[["measure", "first", "second", "held_out"]].to_numpy().tolist()
    assert ["linear", "small", "large", "others"] in found
    assert not [row for row in found if "middle" in row and row[0] == "linear"]
    plain = compare(entry("a", knn=1.0), entry("b", knn=2.0))
    assert not [name for name in (*runs_frame(plain), *groups_frame(plain)) if name.endswith("_held_out")]


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
