"""Losses and gradients that are not finite."""

import pytest
import torch

from pipeline.training.loop import train
from pipeline.training.meter import DivergedError
from pipeline.training.worker import Worker
from tests.training.engine import PLAIN, keep_snapshots, run_training, through_bytes, train_config
from tests.training.tiny_task import BATCH, TinyTask


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_images():
    snapshots = []
    with pytest.raises(DivergedError, match=r"nan at step 4; the batch holds e0-b3-r0-0, .*e0-b3-r0-3 \(4 images\)"):
        train(TinyTask(poison={0: 3}), train_config(), Worker(), None, keep_snapshots(snapshots))
    assert [snapshot.name for snapshot in snapshots] == ["checkpoint-0000-000000"]


def test_a_checkpoint_never_holds_weights_of_a_loss_that_is_not_finite(monkeypatch):
    monkeypatch.setattr("pipeline.training.meter.POINTS_PER_EPOCH", 1)
    snapshots = []
    with pytest.raises(DivergedError, match="nan at step 4; the batch holds e0-b3-r0-0"):
        train(TinyTask(poison={0: 3}), train_config(checkpoint_steps=2), Worker(), None, keep_snapshots(snapshots))
    assert [snapshot.name for snapshot in snapshots] == ["checkpoint-0000-000000", "checkpoint-0000-000002"]
    assert all(torch.isfinite(value).all() for value in snapshots[-1].state["model"].values())


def test_divergence_leaves_keys_and_states_in_a_file_that_the_error_names(whole):
    dumped = {}

    def dump(name, content):
        dumped[name] = through_bytes(content)
        return f"there/{name}"

    with pytest.raises(
        DivergedError, match=r"nan at step 4.*optimiser state of step 4, are in there/diverged-step-00000004.pt$"
    ):
        train(TinyTask(poison={0: 3}), train_config(), Worker(dump=dump), None, lambda _: None)
    (content,) = dumped.values()
    assert content["diverged"]["step"] == 4
    assert content["diverged"]["keys"] == [f"e0-b3-r0-{number}" for number in range(BATCH)]
    # The step with the NaN changed no weight, and nothing of the average: these gave it.
    good = run_training(TinyTask(), train_config(checkpoint_steps=3))[1].state
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
        run_training(Steep(**PLAIN), train_config())
