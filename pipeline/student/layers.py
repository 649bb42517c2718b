"""The layers of ReGLA and how each one folds for inference.

Marks in the docstrings: [paper] stated in the ReGLA paper, arXiv 2602.05262; [2nd] stated only by third-party summaries
of it; [family: X] taken from the published relative X; [ours] our choice, with the reason. All maps are (B, C, H, W).

A layer's method ``fuse() -> nn.Module`` returns its replacement at inference, so both :func:`fuse_children` and
``timm.utils.reparameterize_model`` fold a whole network. Folding is done in float64 and cast back once.
"""

import copy
from typing import TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Affine = TypeVar("Affine", nn.Conv2d, nn.Linear)

ACTIVATIONS: dict[str, type[nn.Module]] = {"hardswish": nn.Hardswish, "gelu": nn.GELU}


class ConvBN(nn.Sequential):
    """Convolution without bias, then BatchNorm2d: (B, in_dim, H, W) -> (B, out_dim, ceil(H/stride), ceil(W/stride)).

    [family: iFormer, RepViT] BatchNorm everywhere and no LayerNorm, so that every norm folds away at inference.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the float64 (weight, bias) of the one convolution that equals this pair in eval mode [family: RepViT]."""
        scale, shift = affine(self.bn)
        return double(self.conv.weight) * scale.view(-1, 1, 1, 1), shift

    def fuse(self) -> nn.Conv2d:
        """Return one Conv2d with bias that equals this module in eval mode."""
        return with_parameters(self.conv, *self.folded())


class RepDW(nn.Module):
    """Depthwise convolution with parallel training branches: (B, C, H, W) -> (B, C, H, W).

    BN(DW_kernel(x)) [+ BN(DW_small(x))] [+ x] in training, one biased DW_kernel at inference
    [family: RepViT, RepLKNet, UniRepLKNet].

    Args:
        kernel: odd kernel size.
        small: odd kernel size of the extra branch, at most ``kernel``; 0 leaves the branch out.
        identity: add the input.
    """

    def __init__(self, dim: int, kernel: int, small: int = 0, identity: bool = False) -> None:
        super().__init__()
        self.large = ConvBN(dim, dim, kernel, groups=dim)
        self.small = ConvBN(dim, dim, small, groups=dim) if small else None
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), same dtype."""
        y = self.large(x)
        if self.small is not None:
            y = y + self.small(x)
        return x + y if self.identity else y

    def fuse(self) -> nn.Conv2d:
        """Return one depthwise Conv2d with bias that equals this module in eval mode."""
        weight, bias = self.large.folded()
        centre = weight.shape[-1] // 2
        if self.small is not None:
            small_weight, small_bias = self.small.folded()
            margin = centre - small_weight.shape[-1] // 2
            weight = weight + nn.functional.pad(small_weight, [margin] * 4)
            bias = bias + small_bias
        if self.identity:
            weight[..., centre, centre] += 1
        return with_parameters(self.large.conv, weight, bias)


class Residual(nn.Module):
    """x + DropPath(gamma * branch(x)), with layer scale gamma of shape (1, C, 1, 1) or none [family: iFormer].

    Args:
        branch: maps (B, C, H, W) to the same shape; it must register its final ConvBN last.
        drop_path: probability of dropping the branch per sample, in training only.
        layer_scale: initial value of gamma; None leaves gamma out.
    """

    gamma: nn.Parameter | None

    def __init__(self, branch: nn.Module, dim: int, drop_path: float = 0.0, layer_scale: float | None = None) -> None:
        super().__init__()
        self.branch = branch
        gamma = None if layer_scale is None else nn.Parameter(torch.full((1, dim, 1, 1), layer_scale))
        self.register_parameter("gamma", gamma)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), same dtype."""
        y = self.branch(x)
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y)

    def start_branch_at(self, scale: float) -> None:
        """Set the scale of the branch's last norm: 1 as a BatchNorm starts, 0 to start the block as the identity."""
        nn.init.constant_(self._last_norm().weight, scale)

    def fuse(self) -> "Residual":
        """Fold gamma into the last norm of the branch, drop the DropPath, fuse the branch; return self."""
        if self.gamma is not None:
            norm = self._last_norm()
            norm.weight.data.mul_(self.gamma.flatten())
            norm.bias.data.mul_(self.gamma.flatten())
            self.gamma = None
        self.drop_path = nn.Identity().train(self.training)
        return fuse_children(self)

    def _last_norm(self) -> nn.BatchNorm2d:
        return [module for module in self.branch.modules() if isinstance(module, ConvBN)][-1].bn


class FFN(nn.Sequential):
    """Two 1x1 convolutions around an activation: (B, C, H, W) -> (B, C, H, W), width C -> ratio * C -> C.

    [family: iFormer FFN2d], with optional depthwise convolutions of the ELRF block: ``before`` the expansion, on C channels,
    and ``inside``, on the hidden channels before the activation.
    """

    def __init__(
        self, dim: int, ratio: float, act: str, before: nn.Module | None = None, inside: nn.Module | None = None
    ) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        if before is not None:
            self.before = before
        self.expand = ConvBN(dim, hidden)
        if inside is not None:
            self.inside = inside
        self.act = ACTIVATIONS[act]()
        self.project = ConvBN(hidden, dim)


class NormLinear(nn.Sequential):
    """BatchNorm1d, then Linear: (B, dim) -> (B, num_classes) [family: iFormer, RepViT]."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the float64 (weight, bias) of the one Linear that equals this pair in eval mode."""
        scale, shift = affine(self.bn)
        weight = double(self.linear.weight)
        return weight * scale, double(self.linear.bias) + weight @ shift


class Classifier(nn.Module):
    """One NormLinear head, or two whose mean is the prediction: (B, dim) -> (B, num_classes).

    The second is for distillation; with ``distilled_training``, training mode returns both outputs, so that each may learn
    from its own target [family: iFormer, RepViT, DeiT].
    """

    def __init__(self, dim: int, num_classes: int, distill_head: bool = False) -> None:
        super().__init__()
        self.main = NormLinear(dim, num_classes)
        self.distill = NormLinear(dim, num_classes) if distill_head else None
        self.distilled_training = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, dim) to (B, num_classes), or to two of them (see ``distilled_training``)."""
        y = self.main(x)
        if self.distill is None:
            return y
        z = self.distill(x)
        return (y, z) if self.training and self.distilled_training else (y + z) / 2

    def fuse(self) -> nn.Linear:
        """Return one Linear that equals this module in eval mode."""
        weight, bias = self.main.folded()
        if self.distill is not None:
            other_weight, other_bias = self.distill.folded()
            weight, bias = (weight + other_weight) / 2, (bias + other_bias) / 2
        return with_parameters(self.main.linear, weight, bias)


def fuse_children(module: AnyModule) -> AnyModule:
    """Replace, in place and recursively, every child that has ``fuse()`` by what that returns; return ``module``."""
    for name, child in list(module.named_children()):
        fuse = getattr(child, "fuse", None)
        setattr(module, name, fuse() if fuse else fuse_children(child))
    return module


def affine(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the float64 (scale, shift), each (C,), of ``bn`` in eval mode: g / sqrt(var + eps), beta - mean * scale."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = double(bn.weight) / torch.sqrt(double(bn.running_var) + bn.eps)
    return scale, double(bn.bias) - double(bn.running_mean) * scale


def double(tensor: Tensor) -> Tensor:
    """Return a detached float64 copy, on the CPU where the device has no float64 (Apple's MPS)."""
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


def with_parameters(layer: Affine, weight: Tensor, bias: Tensor) -> Affine:
    """Return a copy of ``layer`` with these parameters, in its dtype, device and mode."""
    layer = copy.deepcopy(layer)
    layer.weight, layer.bias = (nn.Parameter(value.to(layer.weight)) for value in (weight, bias))
    return layer
