"""AdamW without torch's compiler, and its groups of parameters."""

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW


class EagerAdamW(AdamW):
    """torch's AdamW, whose methods do not import the compiler.

    torch imports it at the first call of an optimiser, which takes more than a second and 150 MiB, so that it does not trace
    the method. Nothing here traces one: `train.compile` compiles the module alone.
    """

    step = torch.no_grad()(inspect.unwrap(AdamW.step))
    zero_grad = inspect.unwrap(AdamW.zero_grad)
    add_param_group = inspect.unwrap(AdamW.add_param_group)
    state_dict = inspect.unwrap(AdamW.state_dict)
    load_state_dict = inspect.unwrap(AdamW.load_state_dict)


def by_decay(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as an optimiser's groups: those without weight decay, which are norms, biases, other vectors and
    what networks of the module exempt, and those with it; the same as timm's `param_groups_weight_decay`, whose package imports
    torch's compiler.
    """
    exempt = exempt_from_decay(module)
    groups: dict[float, list[nn.Parameter]] = {0.0: [], weight_decay: []}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            without = weight.ndim <= 1 or name.endswith(".bias") or any(fnmatchcase(name, one) for one in exempt)
            groups[0.0 if without else weight_decay].append(weight)
    return [{"params": weights, "weight_decay": decay} for decay, weights in groups.items() if weights]


def exempt_from_decay(module: nn.Module) -> list[str]:
    """Parameters that timm networks in the module exempt from weight decay, besides norms, biases and other vectors."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    ]


def with_lr_factors(
    groups: Sequence[dict[str, Any]], module: nn.Module, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The groups of an optimiser divided by the factors of their parameters' learning rates, which timm's schedulers apply.

    Args:
        factors: by the name of a submodule, none of which contains another.
    """
    if not factors:
        return [*groups]
    own = {id(weight): factor for name, factor in factors.items() for weight in module.get_submodule(name).parameters()}
    divided = []
    for group in groups:
        for factor in (1.0, *dict.fromkeys(factors.values())):
            if weights := [weight for weight in group["params"] if own.get(id(weight), 1.0) == factor]:
                divided.append({**group, "params": weights, "lr_scale": factor})
    return sorted(divided, key=lambda group: group["lr_scale"] != 1)  # the first group's rate is logged
