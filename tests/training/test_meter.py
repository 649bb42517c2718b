"""What is measured in training."""

import pytest
import torch

from pipeline.training.meter import Pace, data_bound
from tests.training.engine import TIMES, history_of, run_training, train_config
from tests.training.tiny_task import BATCH, STEPS, TinyTask


def test_every_step_is_logged_once_with_what_it_cost(whole):
    losses = [(step, metrics) for step, metrics in history_of(whole) if "loss" in metrics]
    assert [step for step, _ in losses] == list(range(1, 3 * STEPS + 1))
    for step, metrics in losses:
        assert metrics["loss/half"] == pytest.approx(metrics["loss"] / 2)
        assert metrics["samples_seen"] == step * BATCH
        assert metrics["epoch"] == pytest.approx(step / STEPS)
        assert metrics["images_per_second"] > 0
        assert 0 < sum(metrics[name] for name in TIMES[1:]) <= 1
        assert metrics["grad_norm"] > 0


def test_the_time_left_follows_the_mean_of_the_run_and_not_its_start_or_the_last_step():
    pace = Pace()
    shown = [pace.add(seconds) or pace.seconds for seconds in (9.0, 1.0, 1.2, 1.1)]
    assert shown == pytest.approx([9.0, 1.0, 1.1, 1.1])
    for _ in range(50):
        pace.add(1.0)
    before = pace.seconds
    pace.add(3.0)
    assert before < pace.seconds < 1.25
    for _ in range(50):
        pace.add(3.0)
    assert pace.seconds == pytest.approx(3.0, abs=0.05)


def test_a_long_epoch_is_logged_in_fifty_means(monkeypatch):
    monkeypatch.setattr("tests.training.tiny_task.STEPS", 120)
    points = [
        (step, metrics)
        for step, metrics in history_of(run_training(TinyTask(), train_config(epochs=1)))
        if "loss" in metrics
    ]
    assert [step for step, _ in points] == list(range(2, 121, 2))
    monkeypatch.setattr("pipeline.training.meter.POINTS_PER_EPOCH", 120)
    fine = [
        metrics["loss"]
        for _, metrics in history_of(run_training(TinyTask(), train_config(epochs=1)))
        if "loss" in metrics
    ]
    assert [metrics["loss"] for _, metrics in points] == pytest.approx(
        [(a + b) / 2 for a, b in zip(fine[::2], fine[1::2], strict=True)], rel=1e-5
    )


def test_the_time_of_a_step_is_divided_into_data_forward_and_backward(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pipeline.training.meter.time.perf_counter", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            now[0] += 2
            return gradient

    class SlowData(TinyTask):
        def batch(self, epoch, number, rank):
            now[0] += 5
            return super().batch(epoch, number, rank)

        def loss(self, module, batch, device):
            now[0] += 1
            loss, parts = super().loss(module, batch, device)
            return Slow.apply(loss), parts

    points = [
        metrics for _, metrics in history_of(run_training(SlowData(), train_config(epochs=1))) if "loss" in metrics
    ]
    for metrics in points:
        assert [metrics[name] for name in TIMES] == [BATCH / 8, 5 / 8, 1 / 8, 2 / 8]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.5, 0.41, 0.05), ""),
        ((0.3, 0.3, 0.35), "span 60% of the last steps; data takes 35%: more CPUs a GPU"),
        ((0.3, 0.3, 0.05), ""),
    ],
)
def test_a_gpu_that_waits_for_data_is_a_warning(shares, expected):
    line = data_bound(dict(zip(("forward_share", "backward_share", "data_wait_share"), shares, strict=True)))
    assert expected in line
    assert bool(line) == bool(expected)
