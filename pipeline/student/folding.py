"""The inference form of any timm backbone: parallel branches merged, BatchNorm folded into what precedes it."""

import torch
from timm.layers import BatchNormAct2d
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

TOLERANCE = 1e-3


@torch.no_grad()
def inference_form(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold ``model`` (in eval mode) for inference in place and return it.

    First the model's own folding (timm's ``reparameterize_model``), then every BatchNorm that reads the output of a
    convolution or linear layer in the same parent module. ``example`` are images (B, C, H, W).

    Raises:
        RuntimeError: the outputs changed by more than 1e-3 of their largest value, because the model uses the output of a
            convolution twice, which hooks do not see.
    """
    before = model(example)
    model = reparameterize_model(model, inplace=True)
    for conv, name in _foldable(model, example):
        _fold(model, conv, name)
    error = (model(example) - before).abs().max() / before.abs().max().clamp_min(1e-12)
    if not error <= TOLERANCE:
        raise RuntimeError(f"folding BatchNorm changed the outputs of {type(model).__name__} by {error:.1e}")
    return model


def _foldable(model: nn.Module, example: Tensor) -> list[tuple[nn.Module, str]]:
    """(layer, name of the BatchNorm that reads its output).

    A norm in another parent often shares its input with a skip connection, so it is not folded.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # keeps the tensor, so that its id is not reused
    pairs: list[tuple[nn.Module, str]] = []

    def produced(name: str, output: Tensor) -> None:
        outputs[id(output)] = name, output

    def consumed(name: str, inputs: tuple[Tensor, ...]) -> None:
        layer, _ = outputs.get(id(inputs[0]), (None, None))
        if layer is not None and layer.rpartition(".")[0] == name.rpartition(".")[0]:
            pairs.append((model.get_submodule(layer), name))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: produced(name, output)))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: consumed(name, inputs)))
    model(example)
    for handle in handles:
        handle.remove()
    return pairs


def _fold(model: nn.Module, layer: nn.Module, name: str) -> None:
    bn = model.get_submodule(name)
    assert isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    fuse = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
    rest = nn.Sequential(bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else nn.Identity()
    model.set_submodule(name, rest.train(False))
