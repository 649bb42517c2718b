import io
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from pyarrow import fs
from timm.scheduler import StepLRScheduler
from torch import nn

from pipeline.cache.read.reader import Batch
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.detect.task import ObjectsBatch
from pipeline.errors import UserError
from pipeline.training.checkpoint import STATE_FILE, best_copy_path, delete_previous_best, load_state
from pipeline.training.config import TrainConfig
from pipeline.training.ema import ModelEma
from pipeline.training.loop import train
from pipeline.training.meter import DivergedError, StepTimer, starved
from pipeline.training.ray_train import _out_of_memory, _shares, fit
from pipeline.training.step import Stepper, not_decayed
from pipeline.training.stopping import StopFile, on_sigterm
from pipeline.training.task import split_batch
from pipeline.training.upload import list_tensors, to_device
from pipeline.training.worker import STOP_REQUESTED, StoppedError, Worker
from tests.training.tiny_task import BATCH, STEPS, TinyTask, WholeBatches, lines, make_tiny_task

CHECKPOINTS = [
    "checkpoint-0000-000000",
    "checkpoint-0000-000004",
    "checkpoint-0000-000006",
    "checkpoint-0001-000000",
    "checkpoint-0001-000002",
    "checkpoint-0001-000006",
    "checkpoint-0002-000000",
    "checkpoint-0002-000004",
    "checkpoint-0002-000006",
    "checkpoint-0003-000000",
]
"""Of 3 epochs of 6 steps with a checkpoint every 4 steps, at the end of an epoch, and after its evaluation."""


TIMES = ("images_per_second", "data_wait_share", "forward_share", "backward_share")


def test_all_tensors_of_a_batch_come_to_a_device_and_nothing_else_changes():
    targets = [
        {"boxes": torch.ones(2, 4), "labels": torch.ones(2)},
        {"boxes": torch.ones(0, 4), "labels": torch.ones(0)},
    ]
    objects = ObjectsBatch(["a", "b"], [torch.ones(3, 4, 5), torch.ones(3, 2, 2)], targets)
    images, labels = torch.ones(2, 3, 4, 4), torch.ones(2)
    cached = Batch(["a", "b"], images, labels, {"hog": {"patches": torch.ones(2, 8)}}, position=(1, 2))
    for batch, count in ((objects, 6), (cached, 3)):
        there = to_device(batch, torch.device("meta"))
        assert type(there) is type(batch)
        assert there.keys == batch.keys
        assert len(list_tensors(batch)) == len(list_tensors(there)) == count
        for a, b in zip(list_tensors(batch), list_tensors(there), strict=True):
            assert b.is_meta
            assert a.shape == b.shape
    assert there.position == (1, 2)


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
    return lambda given: snapshots.append(replace(given, state=_through_bytes(given.state)))


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
    assert whole[4].state["position"] == {"epoch": 1, "batch": 2, "step": 8, "samples": 8 * BATCH}


@pytest.mark.parametrize("survived", range(1, len(CHECKPOINTS)))
def test_an_interrupted_run_ends_as_one_that_was_not(whole, survived):
    rest = _train(TinyTask(), _config(checkpoint_steps=4), whole[survived - 1].state)
    assert [snapshot.name for snapshot in rest] == [snapshot.name for snapshot in whole[survived:]]
    _assert_equal(rest[-1].state, whole[-1].state)
    assert rest[-1].state["evaluations"] == whole[-1].state["evaluations"]
    both = _history(whole[: survived - 1]) + _history(
        rest
    )  # the last interval is said again, as nobody may have heard it
    assert [(step, _without_times(metrics)) for step, metrics in both] == [
        (step, _without_times(metrics)) for step, metrics in _history(whole)
    ]


def _without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def test_a_state_of_another_training_is_refused(whole):
    state = whole[4].state
    groups = state["optimizer"]["param_groups"]
    for part, other in (("optimizer", {"state": {}, "param_groups": groups[1:]}), ("model", {}), ("ema", {})):
        with pytest.raises(UserError, match=r"of step 8 is not of this training.*: remove the folder of the run, and"):
            _train(TinyTask(), _config(), {**state, part: other})


def test_a_finished_run_does_nothing_more(whole):
    task = TinyTask()
    (left,) = _train(task, _config(checkpoint_steps=4), whole[-1].state)
    assert task.judged == []
    assert (left.state, left.history) == (None, whole[-1].history)  # which nobody may have lived to log


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
    monkeypatch.setattr("tests.training.tiny_task.STEPS", 120)
    points = [(step, metrics) for step, metrics in _history(_train(TinyTask(), _config(epochs=1))) if "loss" in metrics]
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


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.5, 0.41, 0.05), ""),
        ((0.3, 0.3, 0.35), "span 60% of the last steps; data takes 35%: more CPUs a GPU"),
        ((0.3, 0.3, 0.05), ""),
    ],
)
def test_that_a_gpu_waits_for_data_is_said(shares, expected):
    line = starved(dict(zip(("forward_share", "backward_share", "data_wait_share"), shares, strict=True)))
    assert expected in line
    assert bool(line) == bool(expected)


def test_evaluation_comes_before_training_and_after_each_epoch_on_the_averaged_weights():
    task = TinyTask()
    snapshots = _train(task, _config())
    steps = [0, STEPS, 2 * STEPS, 3 * STEPS]
    assert [step for step, _ in snapshots[-1].state["evaluations"]] == steps
    assert [step for step, metrics in _history(snapshots) if "score" in metrics] == steps
    for judged, snapshot in zip(task.judged, snapshots[::2], strict=True):
        assert all(torch.equal(judged[name], value) for name, value in snapshot.state["ema"].items())
    trained = snapshots[-1].state
    assert not torch.equal(trained["ema"]["out.weight"], trained["model"]["out.weight"])


@pytest.mark.parametrize("name", ["out.weight", "norm.running_var"])
def test_the_average_follows_weights_and_statistics_at_the_warmed_up_decay(name):
    snapshots = _train(TinyTask(), _config(epochs=1, checkpoint_steps=1, ema_decay=0.4))
    averaged = snapshots[0].state["model"][name]
    for step, snapshot in enumerate(snapshots[1:-1], start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        assert (decay == 0.4) == (step >= 5)
        averaged = decay * averaged + (1 - decay) * snapshot.state["model"][name]
        torch.testing.assert_close(snapshot.state["ema"][name], averaged)


def test_norms_that_hold_an_activation_keep_it_where_workers_share_their_statistics(monkeypatch):
    monkeypatch.setattr("pipeline.training.step.synchronised", lambda worker: True)
    task, images = TinyTask(), torch.randn(2, 3, 32, 32)
    task.module = timm.create_model("mobilenetv2_050", num_classes=4).eval()
    before = task.module(images)
    stepper = Stepper(task, _config(), Worker(), [1])
    norms = [module for module in stepper.module.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == 52
    torch.testing.assert_close(stepper.module(images), before)


def test_without_decay_the_average_is_the_weights_bit_by_bit():
    state = _train(TinyTask(), _config(epochs=1, ema_decay=0))[-1].state
    assert all(torch.equal(value, state["ema"][name]) for name, value in state["model"].items())


def test_what_is_neither_weight_nor_statistics_is_that_of_the_module_also_after_loading():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("infinite", torch.tensor(math.inf))
            self.register_buffer("queue", torch.zeros(4))

    module = Counting()
    average = ModelEma(module, 0.9)
    module.norm(torch.randn(5, 3))
    module.queue[1] = 7
    module.norm.weight.data += 1
    average.update(1)
    for name in ("norm.num_batches_tracked", "infinite", "queue"):
        assert torch.equal(average.module.state_dict()[name], module.state_dict()[name])
    assert not torch.equal(average.module.norm.running_mean, module.norm.running_mean)
    assert not torch.equal(average.module.norm.weight, module.norm.weight)
    assert not average.module.training
    assert module.training
    kept = _through_bytes({"module": module.state_dict(), "average": average.module.state_dict()})
    module.load_state_dict(kept["module"])
    average.module.load_state_dict(kept["average"])
    module.norm.weight.data += 1
    average.update(10**6)
    torch.testing.assert_close(average.module.norm.weight, kept["average"]["norm.weight"].lerp(module.norm.weight, 0.1))


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


def test_what_a_network_says_is_not_decayed_within_whatever_holds_it():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.gamma = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 4, 1, 1))
            self.layer = nn.Linear(4, 4)

        def no_weight_decay(self):
            return {"token", "gamma"}

    assert sorted(not_decayed(Network())) == ["gamma", "token"]
    holder = nn.ModuleDict({"student": nn.ModuleDict({"backbone": Network()}), "neck": nn.Linear(4, 4)})
    assert sorted(not_decayed(holder)) == ["student.backbone.gamma", "student.backbone.token"]
    task = TinyTask()
    task.module = holder
    groups = Stepper(task, _config(weight_decay=0.5), Worker(), [1]).optimizer.param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in holder.named_parameters() if id(parameter) in decayed}
    assert names == {"student.backbone.layer.weight", "neck.weight"}


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
    task.evaluate = lambda averaged, raw: {}
    state = _train(task, _config(epochs=1, precision=precision))[-1].state
    assert task.module.dtypes == {dtype}
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())


def test_other_ranks_evaluate_the_weights_of_the_first_and_keep_neither_metrics_nor_state(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.mul_(2))  # as if rank 0 had the same
    monkeypatch.setattr("torch.distributed.broadcast", lambda values, source: values.fill_(source))  # and all zeros
    task, snapshots = TinyTask(rank=1, world=2), []
    train(task, _config(epochs=1), Worker(rank=1, world=2), None, snapshots.append)
    assert len(task.judged) == 2
    assert not any(value.any() for judged in task.judged for value in judged.values())
    assert not any(value.any() for value in task.module.state_dict().values())
    assert (task.worker.rank, task.worker.world) == (1, 2)
    assert [snapshot.state for snapshot in snapshots] == [None] * 3
    assert "score" not in {name for _, metrics in _history(snapshots) for name in metrics}
    assert snapshots[-2].history[-1][1]["samples_seen"] == STEPS * BATCH * 2


def test_a_task_may_have_a_schedule_of_its_own():
    class Scheduled(TinyTask):
        def schedule(self, optimizer, config):
            return StepLRScheduler(optimizer, decay_t=3, decay_rate=0.1, t_in_epochs=False)

    rates = [metrics["learning_rate"] for _, metrics in _losses(_train(Scheduled(), _config(epochs=1)))]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3)


PLAIN = {"dropout": 0.0, "batch_norm": False}
"""Without what differs by rank, so that several ranks compute what one process computes on all batches."""

SHARES = 3


@pytest.fixture(scope="module")
def ray_runs(ray_session, tmp_path_factory):
    """Two starts of a run that began with three workers: two of them, stopped by a NaN of the second, then one."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "train").mkdir()
    (folder / "train" / "shares").write_text(str(SHARES))

    def commit(history, checkpoint):
        """Runs in Ray Train's controller."""
        steps = [step for step, metrics in history if "loss" in metrics]
        with (folder / "committed").open("a") as file:
            file.write(json.dumps([steps, checkpoint]) + "\n")

    def start(name, workers, **task):
        (folder / name).mkdir()
        payload = {"folder": str(folder / name), **PLAIN, **task}
        config = _config(workers=workers, checkpoint_steps=4, best_metric="score")
        checkpoint = fit(make_tiny_task, payload, config, str(folder / "train"), commit)
        with checkpoint.as_directory() as directory:
            return load_state(directory)

    with pytest.raises(DivergedError) as diverged:
        start("diverged", 2, poison={1: 5})
    return SimpleNamespace(folder=folder, error=str(diverged.value), state=start("resumed", 1))


@pytest.mark.slow
def test_on_ray_a_loss_that_is_not_finite_stops_all_workers_at_once_naming_its_batch(ray_runs):
    assert "nan at step 6; the batch holds e0-b5-r1-0" in ray_runs.error


@pytest.mark.slow
def test_on_ray_a_worker_of_two_shares_makes_one_task(ray_runs):
    made = {file.name: file.read_text().split() for file in (ray_runs.folder / "diverged").glob("made-*")}
    assert made == {"made-0": ["made"], "made-1": ["made"]}


@pytest.mark.slow
def test_on_ray_a_second_start_goes_on_from_the_last_checkpoint(ray_runs):
    whole = [f"{epoch}/{number}" for epoch in range(3) for number in range(STEPS)]
    resumed = ray_runs.folder / "resumed"
    assert [lines(resumed, "batches", share) for share in range(SHARES)] == [whole[4:]] * SHARES
    samples = 3 * STEPS * SHARES * BATCH
    assert ray_runs.state["position"] == {"epoch": 3, "batch": 0, "step": 3 * STEPS, "samples": samples}


@pytest.mark.slow
def test_on_ray_divergence_leaves_keys_and_states_beside_the_checkpoints(ray_runs):
    file = ray_runs.folder / "train" / "diverged-step-00000006.pt"
    assert str(file) in ray_runs.error
    content = torch.load(file, weights_only=True)
    assert content["diverged"]["keys"] == [f"e0-b5-r1-{number}" for number in range(BATCH)]
    assert all(torch.isfinite(value).all() for value in content["model"].values())


@pytest.mark.slow
def test_on_ray_the_best_checkpoint_is_kept_beside_the_latest(ray_runs):
    evaluations = ray_runs.state["evaluations"]
    best = max(range(len(evaluations)), key=lambda number: evaluations[number][1]["score"])
    (kept,) = (ray_runs.folder / "train" / "best").iterdir()
    assert kept.name == f"checkpoint-000{best}-000000"
    assert load_state(kept)["position"]["step"] == evaluations[best][0]


@pytest.mark.slow
def test_on_ray_every_step_is_committed_once_with_its_checkpoint(ray_runs):
    committed = [json.loads(line) for line in (ray_runs.folder / "committed").read_text().splitlines()]
    said = [step for steps, _ in committed for step in steps]
    assert said == list(range(1, 5)) + list(
        range(1, 3 * STEPS + 1)
    )  # the second start says again what it finds committed
    assert [Path(checkpoint).name for _, checkpoint in committed] == CHECKPOINTS
    kept = [checkpoint for _, checkpoint in committed if Path(checkpoint).exists()]
    assert [Path(checkpoint).name for checkpoint in kept] == CHECKPOINTS[-2:]
    assert [load_state(checkpoint)["position"]["step"] for checkpoint in kept] == [18, 18]


@pytest.mark.slow
def test_on_ray_workers_of_unequal_shares_hold_equal_weights(ray_runs):
    # Rank 0 writes them down twice a step, for its two shares; so does rank 1, whose share is cut in two.
    first, second = (lines(ray_runs.folder / "diverged", "weights", rank) for rank in (0, 1))
    assert first == second
    assert len(first) == 2 * STEPS
    assert len(set(first)) == STEPS


@pytest.mark.slow
def test_on_ray_two_workers_and_then_one_train_as_one_on_all_batches(ray_runs):
    whole = _train(WholeBatches(world=SHARES, **PLAIN), _config())[-1].state
    for part in ("model", "ema"):
        torch.testing.assert_close(ray_runs.state[part], whole[part], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_what_one_worker_refuses_ends_the_training_after_one_more_start(tmp_path):
    payload = {"folder": str(tmp_path), "refused_by": 1, **PLAIN}
    with pytest.raises(UserError, match=r"^shard 7 is not as it should be$"):
        fit(make_tiny_task, payload, _config(workers=2), str(tmp_path / "train"), lambda history, checkpoint: None)
    assert [lines(tmp_path, "made", rank) for rank in (0, 1)] == [["made"], ["made"]]


PLAIN_STEP = {"epochs": 1, "batch_size": 4, "clip_grad": 100.0}


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulated_gradients_train_as_whole_batches_however_unequal_the_pieces(micro):
    whole = _train(TinyTask(**PLAIN), _config(**PLAIN_STEP))
    cut = _train(TinyTask(**PLAIN), _config(**PLAIN_STEP, micro_batch=micro))
    for part in ("model", "ema"):
        torch.testing.assert_close(cut[-1].state[part], whole[-1].state[part], rtol=1e-5, atol=1e-6)
    for (_, metrics), (_, same) in zip(_losses(cut), _losses(whole), strict=True):
        for name in ("loss", "loss/half", "grad_norm", "samples_seen"):
            assert metrics[name] == pytest.approx(same[name], rel=1e-4)


def test_an_interrupted_run_with_accumulation_ends_as_one_that_was_not():
    config = _config(checkpoint_steps=4, micro_batch=3)
    whole = _train(TinyTask(), config)
    rest = _train(TinyTask(), config, whole[3].state)
    _assert_equal(rest[-1].state, whole[-1].state)
    both = _losses(whole[:4]) + _losses(rest)
    assert [metrics["loss"] for _, metrics in both] == [metrics["loss"] for _, metrics in _losses(whole)]


def _losses(snapshots):
    return [(step, metrics) for step, metrics in _history(snapshots) if "loss" in metrics]


def test_a_batch_is_cut_with_all_that_it_holds():
    batch = Batch(
        ["a", "b", "c"],
        torch.arange(3),
        torch.arange(3) + 10,
        {"teacher": {"summary": torch.arange(6).reshape(3, 2)}},
        (0, 1),
    )
    first, second = split_batch(batch, 2)
    assert (first.keys, second.keys) == (["a"], ["b", "c"])
    assert second.images.tolist() == [1, 2]
    assert second.labels.tolist() == [11, 12]
    assert second.features["teacher"]["summary"].tolist() == [[2, 3], [4, 5]]
    assert first.position == second.position == batch.position
    assert [piece.keys for piece in split_batch(batch, 9)] == [["a"], ["b"], ["c"]]


def test_batches_of_fine_tuning_are_cut_too():
    boxes = [{"boxes": torch.full((2, 4), float(number))} for number in range(3)]
    first, second = split_batch(ObjectsBatch(["a", "b", "c"], list(torch.arange(3)), boxes), 2)
    assert (first.keys, second.keys) == (["a"], ["b", "c"])
    assert second.images == [torch.tensor(1), torch.tensor(2)]
    assert [target["boxes"][0, 0].item() for target in second.targets] == [1, 2]


def test_every_worker_runs_equally_many_forwards_a_step():
    def pieces(rank, world, shares, most=None):
        return Worker(rank, world, shares=shares).pieces(16, most)

    assert pieces(0, 1, 1) == [1]
    assert pieces(0, 1, 1, 5) == [4]
    assert pieces(0, 1, 3, 8) == [2, 2, 2]
    assert [pieces(rank, 2, 3) for rank in (0, 1)] == [[1, 1], [2]]
    assert [pieces(rank, 2, 5) for rank in (0, 1)] == [[1, 1, 1], [2, 1]]
    shares = [list(Worker(rank, 3, shares=8).own_shares) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize(
    ("images", "shares", "world", "micro"),
    [(1, 16, 12, None), (1, 8, 3, None), (2, 5, 4, 1), (4, 3, 2, 3), (1, 2, 1, 1)],
)
def test_all_workers_run_equally_many_forwards_and_synchronise_the_last_also_with_more_pieces_than_images(
    images, shares, world, micro, monkeypatch
):
    counts, weights = set(), 0.0
    for rank in range(world):
        worker = Worker(rank, world, shares=shares)
        tasks = [TinyTask(share, shares, **PLAIN) for share in worker.own_shares]
        stepper = Stepper(tasks[0], _config(micro_batch=micro), worker, [STEPS])
        seen = []

        def backward(piece, weight, synchronise, clock, seen=seen):
            seen.append((weight, synchronise))
            return {"loss": torch.tensor(2.0)}

        monkeypatch.setattr(stepper, "_backward", backward)
        batches = [split_batch(task.batch(0, 0, 0), BATCH // images)[0] for task in tasks]
        parts = stepper._accumulate(batches, 0, StepTimer(worker.device))
        assert float(parts["loss"]) == pytest.approx(2)
        assert [synchronise for _, synchronise in seen] == [False] * (len(seen) - 1) + [True]
        counts.add(len(seen))
        weights += sum(weight for weight, _ in seen)
    assert len(counts) == 1
    assert weights / world == pytest.approx(1)


def test_a_piece_without_weight_changes_nothing(monkeypatch):
    whole = _train(TinyTask(**PLAIN), _config(**PLAIN_STEP))
    monkeypatch.setattr(Worker, "pieces", lambda self, images, most: [BATCH + 3])
    padded = _train(TinyTask(**PLAIN), _config(**PLAIN_STEP))
    for part in ("model", "ema"):
        torch.testing.assert_close(padded[-1].state[part], whole[-1].state[part], rtol=1e-5, atol=1e-6)


def test_one_worker_with_two_shares_trains_as_on_both_batches():
    config = _config(**PLAIN_STEP, micro_batch=3)
    shared = []
    others = [TinyTask(1, 2, **PLAIN)]
    train(TinyTask(0, 2, **PLAIN), config, Worker(shares=2), None, _keep(shared), others)
    whole = _train(WholeBatches(world=2, **PLAIN), _config(**PLAIN_STEP))
    torch.testing.assert_close(shared[-1].state["ema"], whole[-1].state["ema"], rtol=1e-5, atol=1e-6)
    assert shared[-1].state["position"] == {"epoch": 1, "batch": 0, "step": STEPS, "samples": STEPS * 2 * BATCH}
    assert [metrics["loss"] for _, metrics in _losses(shared)] == pytest.approx(
        [metrics["loss"] for _, metrics in _losses(whole)], rel=1e-4
    )


def test_float16_scales_the_loss_and_a_step_that_overflows_changes_nothing():
    class Overflowing(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * (1e38 if batch.keys[0].startswith("e0-b2") else 1), parts

    task = Overflowing(**PLAIN)
    snapshots = _train(task, _config(epochs=1, precision="float16", checkpoint_steps=1))
    assert task.module.dtypes == {torch.float16}
    scales = [snapshot.state["scaler"]["scale"] for snapshot in snapshots]
    assert scales == [65536.0] * 3 + [32768.0] * 5
    before, after, later = (snapshots[step].state["model"]["out.weight"] for step in (2, 3, 4))
    assert torch.equal(before, after)
    assert not torch.equal(after, later)
    assert all(value.dtype == torch.float32 for value in snapshots[-1].state["model"].values())


def test_a_compiled_module_trains_as_one_that_is_not(monkeypatch):
    compiled = []

    def compile_eagerly(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    task = TinyTask()
    state = _train(task, _config(epochs=1, compile=True))[-1].state
    assert compiled == [task.module]
    whole = _train(TinyTask(), _config(epochs=1))[-1].state
    torch.testing.assert_close(state["ema"], whole["ema"])


def test_the_learning_rate_is_scaled_linearly_from_the_batch_that_it_is_for(capsys):
    task, config = TinyTask(), _config(epochs=1, batch_size=4, lr=0.08, lr_batch_size=16, warmup_epochs=0)
    assert config.peak_lr == pytest.approx(0.02)
    assert _losses(_train(task, config))[0][1]["learning_rate"] == pytest.approx(0.02)
    assert "learning rate 0.02 at 4 images per step, scaled linearly from 0.08 at 16" in capsys.readouterr().out


@pytest.mark.parametrize(("best", "expected"), [("highest", [0, 1, 3]), ("lowest", [0, 2])])
def test_a_snapshot_knows_whether_it_is_the_best(best, expected):
    scores = iter([2.0, 3.0, 1.0, 4.0])
    task = TinyTask()
    task.evaluate = lambda averaged, raw: {"score": next(scores)}
    snapshots = _train(task, _config(best_metric="score", best_is=best, checkpoint_steps=4))
    ends = [snapshot for snapshot in snapshots if snapshot.state["position"]["batch"] == 0]
    assert [number for number, snapshot in enumerate(ends) if snapshot.best] == expected
    assert not any(snapshot.best for snapshot in snapshots if snapshot not in ends)


def test_a_metric_of_the_raw_weights_may_be_the_best_from_the_start_on():
    class Both(TinyTask):
        def evaluate(self, averaged, raw):
            return {"raw": 1.0 if raw is None else 0.0}

    snapshots = _train(Both(), _config(best_metric="raw"))
    assert [metrics["raw"] for _, metrics in snapshots[-1].state["evaluations"]] == [1, 0, 0, 0]
    assert [snapshot.best for snapshot in snapshots] == [True] + [False] * 6


@pytest.mark.parametrize(("micro", "images"), [(None, 64), (16, 16)])
def test_a_gpu_of_too_little_memory_is_told_how_many_images_were_too_many(micro, images):
    config = _config(batch_size=256, micro_batch=micro).model_dump()
    assert f"for {images} images at once: set train.micro_batch" in _out_of_memory({"config": config, "shares": 4})


def test_a_best_metric_that_is_not_evaluated_is_refused_before_training():
    with pytest.raises(UserError, match=r"train.best_metric=knn is not among what is evaluated: score"):
        _train(TinyTask(), _config(best_metric="knn"))


def test_the_best_checkpoint_lies_beside_the_latest_alone(tmp_path):
    local = fs.LocalFileSystem()
    for number in (1, 2):
        checkpoint = tmp_path / f"checkpoint-000{number}-000000"
        delete_previous_best(local, str(checkpoint))  # nothing is there yet
        copy = Path(best_copy_path(str(checkpoint)))
        copy.mkdir(parents=True)
        state = {"model": {}, "ema": {}, "position": {"epoch": number}, "evaluations": []}
        torch.save(state, copy / STATE_FILE)
        delete_previous_best(local, str(checkpoint))
    (best,) = (tmp_path / "best").iterdir()
    assert load_state(best)["position"] == {"epoch": 2}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None], ids=["empty", "truncated", "other"])
def test_a_checkpoint_that_is_damaged_is_named_with_what_to_remove(tmp_path, content):
    file = tmp_path / "train" / "checkpoint-0001-000000" / STATE_FILE
    file.parent.mkdir(parents=True)
    torch.save({"model": {}}, file)
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"the checkpoint {file} cannot be read \(.*remove {tmp_path}/train, and"):
        load_state(file.parent)


def test_raw_weights_are_judged_beside_the_averaged_ones():
    class Both(TinyTask):
        watched: tuple = ()

        def evaluate(self, averaged, raw):
            assert raw is (self.module if self.judged else None)
            assert not (raw or averaged).training
            return {**super().evaluate(averaged, raw), **({"raw": 1.0} if raw else {})}

        def draw(self, module, evaluations):
            self.watched = (*self.watched, [step for step, _ in evaluations])

    task = Both()
    evaluations = _train(task, _config())[-1].state["evaluations"]
    assert ["raw" in metrics for _, metrics in evaluations] == [False, True, True, True]
    assert task.watched == ([0], [0, 6], [0, 6, 12], [0, 6, 12, 18])
    assert task.module.training is False


AFTER_NOTICES = ("0-000000", "0-000002", "0-000004", "0-000006", "1-000000", "1-000006", "2-000000")


def test_a_notice_saves_once_and_training_goes_on(monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots = iter([None, "node a", "node a", "node b", *[None] * 99]), []
    train(TinyTask(), _config(epochs=2), Worker(notice=lambda: next(notices)), None, _keep(snapshots))
    names = [snapshot.name for snapshot in snapshots]
    assert names == [f"checkpoint-000{at}" for at in AFTER_NOTICES]


def test_after_the_notice_to_stop_a_second_start_ends_as_an_uninterrupted_run(whole, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots = iter([None] * 9 + [STOP_REQUESTED]), []
    with pytest.raises(StoppedError, match="stopped at step 10 and goes on from there"):
        train(TinyTask(), _config(), Worker(notice=lambda: next(notices)), None, _keep(snapshots))
    assert snapshots[-1].name == "checkpoint-0001-000004"
    rest = _train(TinyTask(), _config(), snapshots[-1].state)
    _assert_equal(rest[-1].state, whole[-1].state)
    assert [step for step, _ in _losses(snapshots[:-1] + rest)] == list(range(1, 3 * STEPS + 1))


def test_after_the_notice_to_stop_at_the_end_of_an_epoch_its_evaluation_waits_for_the_second_start(whole, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots, task = iter([None] * 5 + [STOP_REQUESTED]), [], TinyTask()
    with pytest.raises(StoppedError, match="stopped at step 6 and goes on from there"):
        train(task, _config(), Worker(notice=lambda: next(notices)), None, _keep(snapshots))
    assert snapshots[-1].name == "checkpoint-0000-000006"
    assert len(task.judged) == 1
    assert _train(TinyTask(), _config(), snapshots[-1].state)[-1].state["evaluations"] == whole[-1].state["evaluations"]


def test_the_first_sigterm_writes_the_file_that_stops_workers_and_the_second_is_as_ever(tmp_path, capsys):
    before, stop = signal.getsignal(signal.SIGTERM), StopFile(fs.LocalFileSystem(), str(tmp_path / "stop"))
    stop.remove()
    with on_sigterm(stop.write):
        assert not stop.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
    assert stop.exists()
    assert "saving a checkpoint" in capsys.readouterr().out
    stop.remove()
    assert not (tmp_path / "stop").exists()


def test_a_run_keeps_the_shares_that_it_started_with(tmp_path):
    folder = str(tmp_path / "train")
    assert _shares(_config(batch_size=12, workers=(1, 4)), folder) == 4
    assert _shares(_config(batch_size=12, workers=2), folder) == 4
    with pytest.raises(UserError, match=r"train.batch_size=12 cannot be shared equally by 5 workers; 10 or 15 can"):
        load_config(DistillJobConfig, None, ["train.batch_size=12", "train.workers=[1, 5]"])


def test_divergence_leaves_keys_and_states_in_a_file_that_the_error_names(whole):
    dumped = {}

    def dump(name, content):
        dumped[name] = _through_bytes(content)
        return f"there/{name}"

    with pytest.raises(
        DivergedError, match=r"nan at step 4.*optimiser state of step 4, are in there/diverged-step-00000004.pt$"
    ):
        train(TinyTask(poison={0: 3}), _config(), Worker(dump=dump), None, lambda _: None)
    (content,) = dumped.values()
    assert content["diverged"]["step"] == 4
    assert content["diverged"]["keys"] == [f"e0-b3-r0-{number}" for number in range(BATCH)]
    # The step with the NaN changed no weight, and nothing of the average: these gave it.
    good = _train(TinyTask(), _config(checkpoint_steps=3))[1].state
    assert all(torch.equal(content["model"][name], good["model"][name]) for name in ("conv.weight", "out.weight"))
    averaged = ("conv.weight", "out.weight", "norm.running_mean", "norm.running_var")
    assert all(torch.equal(content["ema"][name], good["ema"][name]) for name in averaged)
    assert content["optimizer"]["state"]


def test_a_gradient_that_is_not_finite_is_divergence_too():
    class Steep(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            if batch.keys[0].startswith("e0-b2"):
                loss = loss + (module(batch.pixels) * 0).sum().sqrt()
            return loss, parts

    with pytest.raises(DivergedError, match=r"its gradient not finite, at step 3; the batch holds e0-b2-r0-0"):
        _train(Steep(**PLAIN), _config())
