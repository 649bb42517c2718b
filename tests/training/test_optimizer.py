"""AdamW outside the compiler, and its groups of parameters."""

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from pipeline.training.optimizer import EagerAdamW, by_decay


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(kind: type[torch.optim.AdamW], restore_at: int | None = None) -> list[torch.Tensor]:
    module = network()
    optimizer = kind(by_decay(module, 0.1), lr=0.01)
    for step in range(6):
        if step == restore_at:
            state = optimizer.state_dict()
            optimizer = kind(by_decay(module, 0.1), lr=1.0)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        module(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
        optimizer.step()
    return [weight.detach() for weight in module.parameters()]


def test_it_steps_as_torchs_does_also_after_a_restore():
    expected = train(torch.optim.AdamW)
    assert not torch.equal(expected[0], next(network().parameters()))
    for weights in (train(EagerAdamW), train(EagerAdamW, restore_at=3)):
        assert all(map(torch.equal, weights, expected))


def test_hooks_of_steps_are_called():
    module, seen = network(), []
    optimizer = EagerAdamW(module.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    optimizer.step()
    assert len(seen) == 1
    assert torch.is_grad_enabled()


def test_groups_are_those_of_timm():
    for name in ("vit_tiny_patch16_224", "resnet18"):
        module = timm.create_model(name, num_classes=3)
        next(module.parameters()).requires_grad_(False)
        exempt = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        for decay in (0.0, 0.05):
            theirs = param_groups_weight_decay(module, decay, no_weight_decay_list=exempt)
            ours = by_decay(module, decay)
            assert [group["weight_decay"] for group in ours] == [group["weight_decay"] for group in theirs]
            assert [[*map(id, group["params"])] for group in ours] == [[*map(id, group["params"])] for group in theirs]
