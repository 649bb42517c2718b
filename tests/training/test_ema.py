"""The exponential moving average of the weights."""

import math

import pytest
import torch
from torch import nn

from pipeline.training.step import ModelEma
from tests.training.engine import run_training, through_bytes, train_config
from tests.training.tiny_task import TinyTask


@pytest.mark.parametrize("name", ["out.weight", "norm.running_var"])
def test_the_average_follows_weights_and_statistics_at_the_warmed_up_decay(name):
    snapshots = run_training(TinyTask(), train_config(epochs=1, checkpoint_steps=1, ema_decay=0.4))
    averaged = snapshots[0].state["model"][name]
    for step, snapshot in enumerate(snapshots[1:-1], start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        assert (decay == 0.4) == (step >= 5)
        averaged = decay * averaged + (1 - decay) * snapshot.state["model"][name]
        torch.testing.assert_close(snapshot.state["ema"][name], averaged)


def test_without_decay_the_average_is_the_weights_bit_by_bit():
    state = run_training(TinyTask(), train_config(epochs=1, ema_decay=0))[-1].state
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
    kept = through_bytes({"module": module.state_dict(), "average": average.module.state_dict()})
    module.load_state_dict(kept["module"])
    average.module.load_state_dict(kept["average"])
    module.norm.weight.data += 1
    average.update(10**6)
    torch.testing.assert_close(average.module.norm.weight, kept["average"]["norm.weight"].lerp(module.norm.weight, 0.1))
