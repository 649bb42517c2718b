"""One optimiser step: random numbers, schedule, weight decay, clipping, precision, compilation."""

import math

import pytest
import timm
import torch
from timm.scheduler import StepLRScheduler
from torch import nn

from pipeline.training.loop import train
from pipeline.training.optimizer import EagerAdamW, exempt_from_decay, with_lr_factors
from pipeline.training.step import Stepper
from pipeline.training.worker import Worker
from tests.training.engine import PLAIN, history_of, losses_of, run_training, train_config
from tests.training.tiny_task import STEPS, TinyTask


def test_what_a_forward_draws_is_decided_by_seed_step_and_share():
    class Drawing(TinyTask):
        def loss(self, module, batch, device):
            drawn.append(torch.rand(()).item())
            return super().loss(module, batch, device)

    def draw(seed, shares):
        drawn.clear()
        tasks = [Drawing(rank, shares) for rank in range(shares)]
        tasks[0].seed = seed
        train(tasks[0], train_config(epochs=1), Worker(shares=shares), None, lambda _: None, tasks[1:])
        return list(drawn)

    drawn: list[float] = []
    first = draw(0, 2)
    assert len(set(first)) == len(first) == 2 * STEPS
    assert draw(0, 2) == first
    assert draw(0, 1) == first[::2]
    assert not set(draw(1, 2)) & set(first)


def test_norms_that_hold_an_activation_keep_it_where_workers_share_their_statistics(monkeypatch):
    monkeypatch.setattr("pipeline.training.step.synchronised", lambda worker: True)
    task, images = TinyTask(), torch.randn(2, 3, 32, 32)
    task.module = timm.create_model("mobilenetv2_050", num_classes=4).eval()
    before = task.module(images)
    stepper = Stepper(task, train_config(), Worker(), [1])
    norms = [module for module in stepper.module.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == 52
    torch.testing.assert_close(stepper.module(images), before)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    task = TinyTask(epochs_differ=True)
    config = train_config(lr=0.1, min_lr=0.001, warmup_epochs=0.5)
    rates = [metrics["learning_rate"] for _, metrics in history_of(run_training(task, config)) if "loss" in metrics]
    steps, warmup = 3 * STEPS + 1, STEPS // 2
    expected = [
        0.001 + t / warmup * 0.099 if t < warmup else 0.001 + 0.5 * 0.099 * (1 + math.cos(math.pi * t / steps))
        for t in range(steps)
    ]
    assert rates == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    history = history_of(run_training(TinyTask(), train_config(epochs=1, warmup_epochs=9)))
    *rising, last = [metrics["learning_rate"] for _, metrics in history if "loss" in metrics]
    assert rising == sorted(set(rising))
    assert 0 < last < rising[-1] < 0.05


def test_norms_and_biases_are_not_decayed():
    config = train_config(epochs=1, weight_decay=0.5, min_lr=0.05, warmup_epochs=0)

    class Still(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * 0, parts

    task = Still()
    nn.init.ones_(task.module.out.bias)
    before = {name: value.detach().clone() for name, value in task.module.named_parameters()}
    run_training(task, config)
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

    assert sorted(exempt_from_decay(Network())) == ["gamma", "token"]
    holder = nn.ModuleDict({"student": nn.ModuleDict({"backbone": Network()}), "neck": nn.Linear(4, 4)})
    assert sorted(exempt_from_decay(holder)) == ["student.backbone.gamma", "student.backbone.token"]
    task = TinyTask()
    task.module = holder
    groups = Stepper(task, train_config(weight_decay=0.5), Worker(), [1]).optimizer.param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in holder.named_parameters() if id(parameter) in decayed}
    assert names == {"student.backbone.layer.weight", "neck.weight"}


def test_gradients_are_clipped_and_their_norm_before_it_is_logged():
    class Steep(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * 1e4, parts

    task, norms = Steep(), []
    step = EagerAdamW.step

    def spy(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for p in task.module.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerAdamW, "step", spy)
        history = history_of(run_training(task, train_config(epochs=1, clip_grad=0.25)))
    assert norms == pytest.approx([0.25] * STEPS, rel=1e-3)
    assert all(metrics["grad_norm"] > 100 for _, metrics in history if "loss" in metrics)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_precision_is_that_of_the_forward_and_weights_stay_float32(precision, dtype):
    task = TinyTask()
    task.evaluate = lambda averaged, raw: {}
    state = run_training(task, train_config(epochs=1, precision=precision))[-1].state
    assert task.module.dtypes == {dtype}
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())


def test_a_task_may_have_a_schedule_of_its_own():
    class Scheduled(TinyTask):
        def schedule(self, optimizer, config):
            return StepLRScheduler(optimizer, decay_t=3, decay_rate=0.1, t_in_epochs=False)

    rates = [metrics["learning_rate"] for _, metrics in losses_of(run_training(Scheduled(), train_config(epochs=1)))]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3)


def test_float16_scales_the_loss_and_a_step_that_overflows_changes_nothing():
    class Overflowing(TinyTask):
        def loss(self, module, batch, device):
            loss, parts = super().loss(module, batch, device)
            return loss * (1e38 if batch.keys[0].startswith("e0-b2") else 1), parts

    task = Overflowing(**PLAIN)
    snapshots = run_training(task, train_config(epochs=1, precision="float16", checkpoint_steps=1))
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
    state = run_training(task, train_config(epochs=1, compile=True))[-1].state
    assert compiled == [task.module]
    whole = run_training(TinyTask(), train_config(epochs=1))[-1].state
    torch.testing.assert_close(state["ema"], whole["ema"])


def test_the_learning_rate_is_scaled_linearly_from_the_batch_that_it_is_for(capsys):
    task, config = TinyTask(), train_config(epochs=1, batch_size=4, lr=0.08, lr_batch_size=16, warmup_epochs=0)
    assert config.peak_lr == pytest.approx(0.02)
    assert losses_of(run_training(task, config))[0][1]["learning_rate"] == pytest.approx(0.02)
    assert "learning rate 0.02 at 4 images per step, scaled linearly from 0.08 at 16" in capsys.readouterr().out


def test_a_part_of_the_module_may_learn_at_a_rate_of_its_own():
    task = TinyTask()
    task.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    task.lr_factors = {"0": 0.1, "1": 0.5}
    config = train_config(lr=0.1, min_lr=0.001, warmup_epochs=0)
    stepper = Stepper(task, config, Worker(), [10])
    rates = {id(weight): group["lr"] for group in stepper.optimizer.param_groups for weight in group["params"]}
    assert len(rates) == len([*task.module.parameters()])
    for number, factor in enumerate((0.1, 0.5, 1.0)):
        assert [rates[id(weight)] for weight in task.module[number].parameters()] == [pytest.approx(0.1 * factor)] * 2
    decay = {
        id(weight): group["weight_decay"] for group in stepper.optimizer.param_groups for weight in group["params"]
    }
    assert [decay[id(weight)] > 0 for weight in task.module.parameters()] == [True, False, False, False, True, False]
    stepper.schedule.step_update(5)
    halfway = 0.001 + 0.5 * 0.099
    assert sorted({group["lr"] for group in stepper.optimizer.param_groups}) == pytest.approx(
        [halfway * factor for factor in (0.1, 0.5, 1.0)]
    )


def test_without_factors_the_groups_stay_as_they_are():
    groups = [{"params": [1], "weight_decay": 0.0}]
    assert with_lr_factors(groups, nn.Identity(), {}) == groups
