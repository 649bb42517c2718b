from dataclasses import replace

import pytest

from pipeline.compare.collect import Point
from pipeline.compare.group import Summary, changes, differing, group
from tests.compare.experiments import entry


def test_runs_that_differ_in_the_seed_alone_are_a_group():
    rows = [entry("regla_t", seed, knn=20.0 + seed, macs=7.0) for seed in range(3)] + [entry("regla_s", 0, knn=30.0)]
    small, large = group(rows)
    assert (small.label, large.label) == ("regla_t", "regla_s")
    assert small.measures == {"knn": Summary(21.0, 1.0, 3), "macs": Summary(7.0, 0.0, 3)}
    assert large.measures == {"knn": Summary(30.0, None, 1)}


def test_of_runs_with_the_same_seed_the_latest_finished_one_counts():
    rows = [entry("regla_t", 0, knn=10.0), entry("regla_t", 0, knn=20.0), entry("regla_t", 1, knn=22.0)]
    rows += [entry("regla_t", 1, status="failed", knn=99.0), entry("regla_t", 2, status="running", knn=98.0)]
    (only,) = group(rows)
    assert only.measures["knn"] == Summary(21.0, pytest.approx(2**0.5), 2)
    assert len(only.entries) == 5
    assert list(only.counted) == ["0", "1"]


def test_a_summary_combines_values_on_the_same_images_alone():
    rows = [entry("regla_t", seed, linear=50.0 + seed) for seed in range(3)]
    rows[0] = replace(rows[0], held_out="others")
    one, other = group(rows)
    assert (one.held_out, one.values("linear")) == ("others", {"0": 50.0})
    assert (other.held_out, other.measures["linear"]) == ("photos", Summary(51.5, pytest.approx(0.5**0.5), 2))


def test_the_knn_of_a_teacher_is_the_mean_over_the_seeds():
    rows = [replace(entry("regla_t", seed, knn=20.0), teacher_knn={"hog": 30.0 + seed}) for seed in range(2)]
    (only,) = group([*rows, replace(entry("regla_t", 2, status="failed"), teacher_knn={"hog": 99.0})])
    assert only.teacher_knn == {"hog": 30.5}


def test_runs_of_which_none_has_finished_are_no_group():
    found = group([entry("regla_t", 0, status="failed", knn=99.0), entry("regla_s", 0, knn=20.0)])
    assert [only.label for only in found] == ["regla_s"]


def test_the_curve_of_a_group_is_the_mean_of_each_epoch():
    curves = [(Point(0.0, 10.0, 10.0), Point(1.0, 20.0, None)), (Point(0.0, 12.0, 10.0),)]
    (only,) = group([entry("regla_t", seed, curve=curve) for seed, curve in enumerate(curves)])
    assert [(point.epoch, point.knn, point.raw) for point in only.curve] == [
        (0.0, Summary(11.0, pytest.approx(2**0.5), 2), Summary(10.0, 0.0, 2)),
        (1.0, Summary(20.0, None, 1), None),
    ]


def test_labels_tell_groups_apart_by_what_differs():
    rows = [entry("regla_t", 0, config={"train.epochs": epochs, "loss.drop": "0.0"}) for epochs in ("4", "8")]
    assert [found.label for found in group([*rows, entry("regla_s", 0)])] == [
        "regla_t · epochs=4",
        "regla_t · epochs=8",
        "regla_s",
    ]
    many = [entry("regla_t", 0, config={f"train.{key}": "1" for key in "abc"} | {"train.d": d}) for d in "12"]
    many += [entry("regla_t", 0, config={f"train.{key}": "2" for key in "abc"} | {"train.d": "1"})]
    labels = [found.label for found in group(many)]
    assert len(set(labels)) == 3
    assert labels[1] == f"{labels[0]} #2"


def test_only_fields_that_differ_are_named():
    one = {"student.name": "regla_t", "train.epochs": "4", "teachers.0.model": "hog"}
    two = {**one, "train.epochs": "8", "teachers.1.model": "sam", "teachers.1.weight": "1.0", "loss.new": "1"}
    assert differing([one, one]) == []
    assert differing([one, two]) == ["loss.new", "teachers.1.model", "train.epochs"]
    assert "teachers.1.weight" in differing([one, two, {**two, "teachers.1.weight": "0.5"}])


def test_runs_of_other_jobs_have_other_fields_which_are_no_changes():
    distilled = [{"job": "distill", "train.lr": lr, "teachers.0.model": "hog"} for lr in "12"]
    probed = {"job": "linear", "evaluate.student": "resnet18"}
    assert changes([*distilled, probed]) == ["job", "train.lr"]
    assert changes([*distilled, probed, {**probed, "evaluate.student": "resnet34"}]) == [
        "job",
        "evaluate.student",
        "train.lr",
    ]


def test_students_of_one_cache_are_a_family_and_others_are_not():
    cache = {"cache.codec": "float16"}
    small, large, other = group(
        [
            entry("regla_t", config=cache),
            entry("regla_s", config={**cache, "student.args.dims": "[32, 64]"}),
            entry("regla_t", config={"cache.codec": "int8"}),
        ]
    )
    assert small.family == large.family != other.family
