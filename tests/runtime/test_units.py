import pytest

from pipeline.runtime.units import counted, size, time_span


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**45, "32.0 TiB")],
)
def test_bytes(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.03, "under 0.1 s"),
        (3.21, "3.2 s"),
        (45, "45 s"),
        (90, "1.5 min"),
        (3540, "59 min"),
        (5400, "1.5 h"),
        (40 * 3600, "40 h"),
        (3.5 * 86400, "3.5 days"),
        (400 * 86400, "400 days"),
    ],
)
def test_a_span_of_time_has_the_unit_that_a_person_would_choose(seconds, text):
    assert time_span(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (980, "980"), (12_500, "12.5 k"), (2_692_640, "2.69 M"), (35.2e9, "35.2 G")]
)
def test_counts(value, text):
    assert counted(value) == text
