import numpy as np
import pytest

from pipeline.compare.group import group
from pipeline.compare.measures import KNN
from pipeline.compare.significance import difference, differences, front, fronts, statement
from tests.compare.experiments import entry


def groups(**values):
    """A group for each name with kNN by seed."""
    return group([entry(name, seed, knn=knn) for name, by_seed in values.items() for seed, knn in by_seed.items()])


def test_the_front_is_what_nobody_beats_in_both():
    assert front([(10, 1), (20, 2), (15, 3), (20, 2), (25, 9), (25, 10), (9, 1)]) == {0, 1, 3, 4}
    assert front([]) == set()


def test_the_front_of_many_points_is_that_of_the_definition():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 20, (200, 2)).tolist()]
    expected = {
        i for i, (a, c) in enumerate(points) if all(not (b >= a and d <= c) or (b, d) == (a, c) for b, d in points)
    }
    assert front(points) == expected
    assert 0 < len(expected) < 40


def test_each_cost_has_its_front_and_each_set_of_images_its_own():
    rows = [
        entry("regla_t", knn=20.0, parameters=3e6, latency=9.0),
        entry("regla_s", knn=25.0, parameters=6e6, latency=5.0),
        entry("regla_m", knn=24.0, parameters=9e6),
        entry("elsewhere", knn=2.0, parameters=9e9, held_out="others"),
    ]
    assert fronts(group(rows), ["knn", "linear"]) == {("knn", "parameters"): {0, 1, 3}, ("knn", "latency"): {1}}


def test_groups_with_the_same_seeds_are_compared_seed_by_seed():
    two = groups(regla_t={0: 20.0, 1: 22.0, 2: 24.0}, regla_s={2: 25.0, 0: 21.1, 1: 23.2})
    found = difference("knn", two, 0, 1)
    # By hand: differences -1.1, -1.2, -1.0, mean -1.1, standard error 0.1 / sqrt(3), t = -19.05, 2 degrees of freedom.
    assert (found.test, found.n) == ("paired by seed", (3, 3))
    assert found.delta == pytest.approx(-1.1)
    assert found.p == pytest.approx(0.002744, rel=1e-3)
    assert found.interval == (pytest.approx(-1.3484, abs=1e-4), pytest.approx(-0.8516, abs=1e-4))
    assert statement(found, two, KNN) == (
        "regla_s (23.1 %) is 1.1 points above regla_t (22.0 %); 95 % confidence interval 0.9 to 1.3, p = 0.0027 "
        "(t-test, paired by seed, 3 seeds): significant at 5 %."
    )


def test_groups_with_other_seeds_are_compared_by_welch():
    two = groups(regla_t={0: 20.0, 1: 22.0, 2: 24.0}, regla_s={0: 21.0, 3: 23.0})
    found = difference("knn", two, 0, 1)
    # By hand: means 22 and 22, variances 4 and 2, so t = 0 and p = 1.
    assert (found.test, found.n, found.delta, found.p) == ("Welch", (3, 2), 0.0, pytest.approx(1.0))
    assert "p = 1 (t-test, Welch, 3 and 2 seeds): not significant at 5 %" in statement(found, two, KNN)


def test_the_reason_is_given_if_no_test_is_possible():
    one = groups(regla_t={0: 20.0, 1: 22.0}, regla_s={0: 20.5})
    assert statement(difference("knn", one, 0, 1), one, KNN) == (
        "regla_t (21.0 %) is 0.5 points above regla_s (20.5 %). Significance unknown: 2 and 1 seeds, "
        "at least two of each are needed."
    )
    flat = groups(regla_t={0: 20.0, 1: 22.0}, regla_s={0: 21.0, 1: 23.0})
    found = difference("knn", flat, 0, 1)
    assert (found.test, found.p) == (None, None)
    assert "Significance unknown: no spread over the seeds" in statement(found, flat, KNN)


def test_only_groups_on_the_same_images_and_with_the_figure_are_compared():
    rows = [entry("a", 0, knn=1.0), entry("b", 0, knn=2.0, linear=3.0), entry("c", 0, knn=2.0, held_out="others")]
    found = group([*rows, entry("d", 0)])
    assert [(d.measure, d.first, d.second) for d in differences(found, ["knn", "linear"])] == [("knn", 0, 1)]


def test_each_accuracy_is_compared_on_its_own_images():
    rows = [
        entry("a", knn=1.0, linear=9.0, parameters=1e6),
        entry("b", knn=2.0, parameters=2e6),
        entry("b", linear=8.0, parameters=2e6, held_out="others"),
        entry("c", knn=9.0, linear=7.0, parameters=3e6, held_out="others"),
    ]
    found = group(rows)
    pairs = [(d.measure, d.first, d.second) for d in differences(found, ["knn", "linear"])]
    assert pairs == [("knn", 0, 1), ("linear", 2, 3)]
    assert fronts(found, ["knn", "linear"]) == {("knn", "parameters"): {0, 1, 3}, ("linear", "parameters"): {0, 2}}
