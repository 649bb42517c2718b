import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.training import DivergedError, Snapshot, Worker, fit, load_state, train
from tests.tiny_task import BATCH, STEPS, TinyTask, WholeBatches, lines, make_tiny_task

CHECKPOINTS = [
    "checkpoint-0000-000000",
    "checkpoint-0000-000004",
    "checkpoint-0001-000000",
    "checkpoint-0001-000002",
    "checkpoint-0002-000000",
    "checkpoint-0002-000004",
    "checkpoint-0003-000000",
]
"""Of 3 epochs of 6 steps with a checkpoint every 4 steps and at epoch ends."""


TIMES = ("images_per_second", "data_wait_share", "forward_share", "backward_share")


def _config(**changes):
    settings = {"epochs": 3, "batch_size": 2, "lr": 0.05, "ema_decay": 0.9, "precision": "float32", "workers": 1}
    return TrainConfig(**{**settings, **changes})


def _through_bytes(state):
    """As a checkpoint file keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _keep(snapshots):
    """A commit that keeps every snapshot as its file would hold it."""
    return lambda given: snapshots.append(Snapshot(given.name, _through_bytes(given.state), given.history))


def _train(task, config, state=None):
    """Train to the end; gives every snapshot."""
    snapshots = []
    train(task, config, Worker(), state, _keep(snapshots))
    return snapshots


def _history(snapshots):
    return [(step, metrics) for snapshot in snapshots for step, metrics in snapshot.history]


def _assert_equal(state, other):
    for part in ("model", "ema"):
        assert state[part].keys() == other[part].keys()
        for name, value in state[part].items():
            assert torch.equal(value, other[part][name]), f"{part} {name}"


@pytest.fixture(scope="module")
def whole():
    """Snapshots of a run that nothing interrupted, with the checkpoints of `CHECKPOINTS`."""
    return _train(TinyTask(), _config(checkpoint_steps=4))


def test_checkpoints_are_committed_before_training_within_epochs_and_at_their_ends(whole):
    assert [snapshot.name for snapshot in whole] == CHECKPOINTS == sorted(CHECKPOINTS)
    assert whole[3].state["position"] == {"epoch": 1, "batch": 2, "step": 8, "samples": 8 * BATCH}


@pytest.mark.parametrize("survived", range(1, 7))
def test_an_interrupted_run_ends_as_one_that_was_not(whole, survived):
    rest = _train(TinyTask(), _config(checkpoint_steps=4), whole[survived - 1].state)
    assert [snapshot.name for snapshot in rest] == [snapshot.name for snapshot in whole[survived:]]
    _assert_equal(rest[-1].state, whole[-1].state)
    assert rest[-1].state["evaluations"] == whole[-1].state["evaluations"]
    both = _history(whole[:survived]) + _history(rest)
    assert [(step, _without_times(metrics)) for step, metrics in both] == [
        (step, _without_times(metrics)) for step, metrics in _history(whole)
    ]


def _without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def test_a_finished_run_does_nothing_more(whole):
    assert _train(TinyTask(), _config(checkpoint_steps=4), whole[-1].state) == []


def test_the_optimizer_is_part_of_a_checkpoint(whole):
    rest = _train(TinyTask(), _config(checkpoint_steps=4), {**whole[2].state, "optimizer": whole[0].state["optimizer"]})
    with pytest.raises(AssertionError):
        _assert_equal(rest[-1].state, whole[-1].state)


def test_what_a_forward_draws_is_decided_by_seed_step_and_share():
    class Drawing(TinyTask):
        def loss(self, module, batch, device):
            drawn.append(torch.rand(()).item())
            return super().loss(module, batch, device)

    def draw(seed, shares):
        drawn.clear()
        tasks = [Drawing(rank, shares) for rank in range(shares)]
        tasks[0].seed = seed
        train(tasks[0], _config(epochs=1), Worker(shares=shares), None, lambda _: None, tasks[1:])
        return list(drawn)

    drawn: list[float] = []
    first = draw(0, 2)
    assert len(set(first)) == len(first) == 2 * STEPS
    assert draw(0, 2) == first
    assert draw(0, 1) == first[::2]
    assert not set(draw(1, 2)) & set(first)


def test_every_step_is_logged_once_with_what_it_cost(whole):
    losses = [(step, metrics) for step, metrics in _history(whole) if "loss" in metrics]
    assert [step for step, _ in losses] == list(range(1, 3 * STEPS + 1))
    for step, metrics in losses:
        assert metrics["loss/half"] == pytest.approx(metrics["loss"] / 2)
        assert metrics["samples_seen"] == step * BATCH
        assert metrics["epoch"] == pytest.approx(step / STEPS)
        assert metrics["images_per_second"] > 0
        assert 0 < sum(metrics[name] for name in TIMES[1:]) <= 1
        assert metrics["grad_norm"] > 0


def test_a_long_epoch_is_logged_in_fifty_means(monkeypatch):
    monkeypatch.setattr("tests.tiny_task.STEPS", 120)
    (single,) = [s for s in _train(TinyTask(), _config(epochs=1)) if s.name == "checkpoint-0001-000000"]
    points = [(step, metrics) for step, metrics in single.history if "loss" in metrics]
    assert [step for step, _ in points] == list(range(2, 121, 2))
    monkeypatch.setattr("pipeline.training.meter.POINTS_PER_EPOCH", 120)
    fine = [metrics["loss"] for _, metrics in _history(_train(TinyTask(), _config(epochs=1))) if "loss" in metrics]
    assert [metrics["loss"] for _, metrics in points] == pytest.approx(
        [(a + b) / 2 for a, b in zip(fine[::2], fine[1::2], strict=True)], rel=1e-5
    )


def test_the_time_of_a_step_is_told_by_data_forward_and_backward(monkeypatch):
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

    points = [metrics for _, metrics in _history(_train(SlowData(), _config(epochs=1))) if "loss" in metrics]
    for metrics in points:
        assert [metrics[name] for name in TIMES] == [BATCH / 8, 5 / 8, 1 / 8, 2 / 8]


def test_evaluation_comes_before_training_and_after_each_epoch_on_the_averaged_weights():
    task = TinyTask()
    snapshots = _train(task, _config())
    steps = [0, STEPS, 2 * STEPS, 3 * STEPS]
    assert [step for step, _ in snapshots[-1].state["evaluations"]] == steps
    assert [step for step, metrics in _history(snapshots) if "score" in metrics] == steps
    for judged, snapshot in zip(task.judged, snapshots, strict=True):
        assert all(torch.equal(judged[name], value) for name, value in snapshot.state["ema"].items())
    trained = snapshots[-1].state
    assert not torch.equal(trained["ema"]["out.weight"], trained["model"]["out.weight"])


def test_the_average_follows_the_weights_at_the_warmed_up_decay():
    # ModelEmaV3's warm-up: 1 - (1 + step)^(-2/3), at most ema_decay.
    snapshots = _train(TinyTask(), _config(epochs=1, checkpoint_steps=1, ema_decay=0.65))
    averaged = snapshots[0].state["model"]["out.weight"]
    for step, snapshot in enumerate(snapshots[1:], start=1):
        decay = 0.0 if step == 1 else min(0.65, 1 - step ** (-2 / 3))
        averaged = decay * averaged + (1 - decay) * snapshot.state["model"]["out.weight"]
        torch.testing.assert_close(snapshot.state["ema"]["out.weight"], averaged)


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_images():
    snapshots = []
    with pytest.raises(DivergedError, match=r"nan at step 4; the batch holds e0-b3-r0-0, .*e0-b3-r0-3 \(4 images\)"):
        train(TinyTask(poison={0: 3}), _config(), Worker(), None, _keep(snapshots))
    assert [snapshot.name for snapshot in snapshots] == ["checkpoint-0000-000000"]


def test_a_checkpoint_never_holds_weights_of_a_loss_that_is_not_finite(monkeypatch):
    monkeypatch.setattr("pipeline.training.meter.POINTS_PER_EPOCH", 1)
    snapshots = []
    with pytest.raises(DivergedError, match="nan at step 4; the batch holds e0-b3-r0-0"):
        train(TinyTask(poison={0: 3}), _config(checkpoint_steps=2), Worker(), None, _keep(snapshots))
    assert [snapshot.name for snapshot in snapshots] == ["checkpoint-0000-000000", "checkpoint-0000-000002"]
    assert all(torch.isfinite(value).all() for value in snapshots[-1].state["model"].values())


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    task = TinyTask(epochs_differ=True)
    config = _config(lr=0.1, min_lr=0.001, warmup_epochs=0.5)
    rates = [metrics["learning_rate"] for _, metrics in _history(_train(task, config)) if "loss" in metrics]
    steps, warmup = 3 * STEPS + 1, STEPS // 2
    expected = [
        0.001 + t / warmup * 0.099 if t < warmup else 0.001 + 0.5 * 0.099 * (1 + math.cos(math.pi * t / steps))
        for t in range(steps)
    ]
    assert rates == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    history = _history(_train(TinyTask(), _config(epochs=1, warmup_epochs=9)))
    *rising, last = [metrics["learning_rate"] for _, metrics in history if "loss" in metrics]
    assert rising == sorted(set(rising))
    assert 0 < last < rising[-1] < 0.05


def test_norms_and_biases_are_not_decayed():
    config = _config(epochs=1, weight_decay=0.5, min_lr=0.05, warmup_epochs=0)

    class Still(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * 0, parts

    task = Still()
    nn.init.ones_(task.module.out.bias)
    before = {name: value.detach().clone() for name, value in task.module.named_parameters()}
    _train(task, config)
    for name, value in task.module.named_parameters():
        decayed = name in ("conv.weight", "out.weight")
        torch.testing.assert_close(
            value.detach(), before[name] * (1 - 0.05 * 0.5) ** STEPS if decayed else before[name]
        )


def test_gradients_are_clipped_and_their_norm_before_it_is_logged():
    class Steep(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * 1e4, parts

    task, norms = Steep(), []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for p in task.module.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        history = _history(_train(task, _config(epochs=1, clip_grad=0.25)))
    assert norms == pytest.approx([0.25] * STEPS, rel=1e-3)
    assert all(metrics["grad_norm"] > 100 for _, metrics in history if "loss" in metrics)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_precision_is_that_of_the_forward_and_weights_stay_float32(precision, dtype):
    task = TinyTask()
    task.evaluate = lambda module: {}
    state = _train(task, _config(epochs=1, precision=precision))[-1].state
    assert task.module.dtypes == {dtype}
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())


def test_other_ranks_neither_evaluate_nor_keep_state(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.mul_(2))  # as if rank 0 had the same
    task, snapshots = TinyTask(rank=1, world=2), []
    train(task, _config(epochs=1), Worker(rank=1, world=2), None, snapshots.append)
    assert task.judged == []
    assert [snapshot.state for snapshot in snapshots] == [None, None]
    assert snapshots[-1].history[-1][1]["samples_seen"] == STEPS * BATCH * 2


PLAIN = {"dropout": 0.0, "batch_norm": False}
"""Without what differs by rank, so that two ranks compute what one process computes on both batches."""


@pytest.fixture(scope="module")
def ray_runs(ray_session, tmp_path_factory):
    """Two starts on one folder with two workers: the first is stopped by a NaN of rank 1, the second is not."""
    folder = tmp_path_factory.mktemp("ray")

    def commit(history, checkpoint):
        """Runs in Ray Train's controller."""
        steps = [step for step, metrics in history if "loss" in metrics]
        with (folder / "committed").open("a") as file:
            file.write(json.dumps([steps, checkpoint]) + "\n")

    def start(name, **task):
        (folder / name).mkdir()
        payload = {"folder": str(folder / name), **PLAIN, **task}
        checkpoint = fit(make_tiny_task, payload, _config(workers=2, checkpoint_steps=4), str(folder / "train"), commit)
        with checkpoint.as_directory() as directory:
            return load_state(directory)

    with pytest.raises(DivergedError) as diverged:
        start("diverged", poison={1: 5})
    return SimpleNamespace(folder=folder, error=str(diverged.value), state=start("resumed"))


def test_on_ray_a_loss_that_is_not_finite_stops_all_workers_at_once_naming_its_batch(ray_runs):
    assert "nan at step 6; the batch holds e0-b5-r1-0" in ray_runs.error
    assert [lines(ray_runs.folder / "diverged", "made", rank) for rank in (0, 1)] == [["made"]] * 2


def test_on_ray_a_second_start_goes_on_from_the_last_checkpoint(ray_runs):
    whole = [f"{epoch}/{number}" for epoch in range(3) for number in range(STEPS)]
    assert [lines(ray_runs.folder / "resumed", "batches", rank) for rank in (0, 1)] == [whole[4:]] * 2
    assert ray_runs.state["position"] == {"epoch": 3, "batch": 0, "step": 3 * STEPS, "samples": 3 * STEPS * 2 * BATCH}


def test_on_ray_every_step_is_committed_once_with_its_checkpoint(ray_runs):
    committed = [json.loads(line) for line in (ray_runs.folder / "committed").read_text().splitlines()]
    assert [step for steps, _ in committed for step in steps] == list(range(1, 3 * STEPS + 1))
    assert [Path(checkpoint).name for _, checkpoint in committed] == CHECKPOINTS
    kept = [checkpoint for _, checkpoint in committed if Path(checkpoint).exists()]
    assert [Path(checkpoint).name for checkpoint in kept] == CHECKPOINTS[-2:]
    assert [load_state(checkpoint)["position"]["step"] for checkpoint in kept] == [16, 18]


def test_two_workers_train_as_one_on_both_batches(ray_runs):
    first, second = (lines(ray_runs.folder / "resumed", "weights", rank) for rank in (0, 1))
    assert first == second
    assert len(set(first)) == 3 * STEPS - 4
    whole = _train(WholeBatches(**PLAIN), _config())[-1].state
    for part in ("model", "ema"):
        torch.testing.assert_close(ray_runs.state[part], whole[part], rtol=1e-4, atol=1e-6)
