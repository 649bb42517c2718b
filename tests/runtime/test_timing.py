"""Interleaved timing on a clock of our own."""

from pipeline.runtime import timing
from pipeline.runtime.timing import interleave


class Machine:
    """A clock that calls advance, slower from round to round."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls, self.slowness = 0.0, [], 1.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.slowness
            self.slowness *= 1.01

        return run


def test_drift_cancels_in_the_ratio(monkeypatch):
    machine = Machine(monkeypatch)
    calls = {"slow": machine.call("slow", 2.0), "fast": machine.call("fast", 1.0)}
    result = interleave(calls, lambda _: "slow", rounds=9, seconds=0)
    assert list(result) == ["slow", "fast"]
    assert result["slow"].ratio == 1
    assert abs(result["fast"].ratio - 0.5) < 0.02
    assert result["slow"].quartiles[1] > 1.1 * result["slow"].quartiles[0]


def test_every_round_visits_all_in_an_order_of_its_own(monkeypatch):
    machine = Machine(monkeypatch)
    names = "abcdef"
    interleave({name: machine.call(name, 1.0) for name in names}, lambda _: "a", rounds=4, seconds=0)
    visits = machine.calls[::2]  # each visit is a call that warms up and a timed one
    rounds = [visits[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(order) == list(names) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_short_call_is_repeated_until_the_visit_is_long_enough(monkeypatch):
    machine = Machine(monkeypatch)
    result = interleave({"a": machine.call("a", 0.01)}, lambda _: "a", rounds=1, seconds=0.1)
    assert len(machine.calls) >= 10
    assert 0.01 <= result["a"].median < 0.012
    assert result["a"].quartiles == (result["a"].median, result["a"].median)
