import io
import sys

import pytest

from pipeline.runtime.progress import Progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_line_comes_now_and_then_with_rate_and_time_left(clock, capsys):
    with Progress(1000, "img", "extract hog", clock=clock) as progress:
        for _ in range(7):
            clock.now += 2
            progress.update(20)
        assert (
            capsys.readouterr().out
            == "extract hog  60/1000 img  10.0 img/s  1:34 left\nextract hog  120/1000 img  10.0 img/s  1:28 left\n"
        )
    assert capsys.readouterr().out == "extract hog  140/1000 img  10.0 img/s  1:26 left\n"


def test_the_last_line_says_how_long_it_took_and_comes_once(clock, capsys):
    with Progress(30, "step", "train", clock=clock) as progress:
        clock.now += 3690
        progress.update(30, loss="0.500")
    assert capsys.readouterr().out == "train  30/30 step  0.0 step/s  1:01:30 total  loss 0.500\n"


def test_rate_and_time_left_count_only_what_was_done_here(clock):
    progress = Progress(100, "step", "train", initial=40, clock=clock)
    for _ in range(2):
        clock.now += 5
        progress.update(10)
    assert progress.line() == "train  60/100 step  2.0 step/s  0:20 left"


def test_the_start_of_processes_does_not_count_in_the_time_left(clock):
    progress = Progress(1000, "img", "extract", clock=clock)
    clock.now += 60
    progress.update(100)
    assert progress.line() == "extract  100/1000 img  1.7 img/s  ? left"
    clock.now += 10
    progress.update(100)
    assert progress.line() == "extract  200/1000 img  2.9 img/s  1:20 left"


def test_time_left_is_unknown_before_anything_is_done(clock):
    assert Progress(100, "step", "train", initial=40, clock=clock).line().endswith("0.0 step/s  ? left")


def test_the_postfix_stays_until_another_one_comes(clock):
    progress = Progress(9, "step", "train", clock=clock)
    progress.update(1, loss="0.9")
    progress.update(1)
    assert progress.line().endswith("  loss 0.9")
    progress.update(1, loss="0.8")
    assert progress.line().endswith("  loss 0.8")


@pytest.mark.parametrize("initial", [0, 5])
def test_nothing_is_printed_when_nothing_was_done(clock, capsys, initial):
    with Progress(5, "step", "train", initial=initial, clock=clock):
        clock.now += 60
    assert capsys.readouterr() == ("", "")


def test_what_was_done_before_a_failure_is_shown(clock, capsys):
    progress = Progress(4, "step", "train", clock=clock)
    for _ in range(2):
        clock.now += 0.5
        progress.update(1)
    progress.__exit__(RuntimeError, RuntimeError(), None)
    assert capsys.readouterr().out == "train  2/4 step  2.0 step/s  0:01 left\n"


def test_a_terminal_gets_a_bar_and_no_lines(clock, capsys, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(4, "step", "train", initial=1, clock=clock) as progress:
        progress.update(3, loss="0.5")
    assert capsys.readouterr().out == ""
    last = screen.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("train: 100%")
    assert "4/4" in last
    assert "loss=0.5" in last
