import pytest

from pipeline.evaluate.chance import chance, class_counts, interval


def test_the_interval_is_wilsons():
    # Brown, Cai and DasGupta 2001 define it; 10 of 20: 0.2993 to 0.7007, 0 of 10: 0 to 0.2775.
    assert interval(50.0, 20) == pytest.approx((29.93, 70.07), abs=0.01)
    assert interval(0.0, 10) == pytest.approx((0.0, 27.75), abs=0.01)
    assert interval(100.0, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    low, high = interval(50.0, 5000)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 5000) ** 0.5 * 100, rel=1e-2)


def test_classes_are_counted_and_chance_names_the_most_frequent(filled):
    assert class_counts(filled.val) == {0: 14, 1: 13, 2: 13}
    assert chance(class_counts(filled.val)) == pytest.approx(35.0)
