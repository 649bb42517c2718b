"""ReGLA: efficient receptive-field modelling with a gated linear attention network, as a timm model.

Paper: J. Li et al., arXiv 2602.05262. Its equations and tables were not available, so every decision carries a mark, as in
`layers.py`. Widths, depths and head counts are all [ours], chosen for parameter parity with iFormer (arXiv 2501.15369).

    stem /4 -> ELRF x L1 -> down /8 -> ELRF x L2 -> down /16 -> RGMA x L3 -> down /32 -> RGMA x L4 -> pool -> classifier

Four stages, ELRF blocks in the first two and RGMA blocks in the last two [paper]. No position table and no fixed input
size: any height and width >= 1. ``import pipeline.student.regla`` registers the sizes, after which
``timm.create_model("regla_m", features_only=True)`` and the like work.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pipeline.student.blocks import ELRF, GATES, NO_GATE, RGMABlock, Stage, Stem
from pipeline.student.layers import ACTIVATIONS, Classifier, ConvBN, Residual, fuse_children

STAGES = 4


class ReGLA(nn.Module):
    """ReGLA backbone and classifier: images (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        dims, depths: channels C1..C4, C1 even, C3 and C4 divisible by their heads; blocks L1..L4.
        heads: heads in stages 3 and 4; one number for both.
        ffn_ratio: FFN expansion per stage.
        qk_dim: query and key channels per head in stages 3 and 4; one number for both.
        elrf_mode, elrf_kernels, reparam: see :class:`ELRF`; kernels odd, >= 3.
        cpe_kernel: kernel of the CPE, odd, >= 3; 0 for none.
        local_kernel: kernel of RGMA's local term: 0 (none), 3 or 5.
        gate_act: "sigmoid", "silu", "hardsigmoid" or "none".
        act: "hardswish" ([ours]: kinder to quantisation, no slower) or "gelu" [family: iFormer].
        stem: "conv" or "fused_ib", see :class:`Stem`.
        drop_path: drop-path rate of the last block; rises linearly from 0 over the blocks.
        layer_scale: initial layer scale, None for none [family: iFormer: none up to L2].
        branch_scale: initial scale of the last BatchNorm of each residual branch: 1 [family: iFormer], or 0, which starts
            every block as the identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1); see docs/results.md.
        num_classes: 0 leaves the classifier out.
        distill_head: second classifier for distillation, see :class:`~pipeline.student.layers.Classifier`.
        drop_rate: dropout in front of the classifier.
        global_pool: "avg", or "" to return the last map (num_classes must then be 0).

    Attributes:
        feature_info: per stage ``num_chs`` (C_i), ``reduction`` (4, 8, 16, 32) and ``module``, as timm expects.
        num_features: C4.

    Raises:
        ValueError: an argument is outside its range; the message names it and what is valid.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: int | Sequence[int],
        ffn_ratio: Sequence[float] = (3, 3, 3, 3),
        qk_dim: int | Sequence[int] = 32,
        elrf_mode: str = "in",
        elrf_kernels: Sequence[int] = (3, 5),
        reparam: bool = True,
        cpe_kernel: int = 3,
        local_kernel: int = 3,
        gate_act: str = "sigmoid",
        act: str = "hardswish",
        stem: str = "conv",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        branch_scale: float = 1.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        distill_head: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        heads, qk_dim = _per_attention_stage(heads), _per_attention_stage(qk_dim)
        _check_shape(dims, depths, heads, ffn_ratio, qk_dim)
        _check_kernels(elrf_kernels, cpe_kernel)
        _check_choice("elrf_mode", elrf_mode, ("in", "mid", "pre"))
        _check_choice("local_kernel", local_kernel, (0, 3, 5))
        _check_choice("gate_act", gate_act, (*GATES, NO_GATE))
        _check_choice("act", act, tuple(ACTIVATIONS))
        _check_choice("stem", stem, ("conv", "fused_ib"))
        _check(0 <= drop_path < 1, "drop_path", drop_path, "a number in [0, 1)")
        _check(0 <= drop_rate < 1, "drop_rate", drop_rate, "a number in [0, 1)")
        _check(branch_scale >= 0, "branch_scale", branch_scale, "a number >= 0")
        _check(layer_scale is None or layer_scale > 0, "layer_scale", layer_scale, "None or a number > 0")
        _check(in_chans >= 1, "in_chans", in_chans, "an integer >= 1")

        common: dict[str, Any] = {"act": act, "layer_scale": layer_scale}
        elrf = partial(ELRF, mode=elrf_mode, kernels=(elrf_kernels[0], elrf_kernels[1]), reparam=reparam, **common)
        rgma = partial(RGMABlock, cpe_kernel=cpe_kernel, local_kernel=local_kernel, gate_act=gate_act, **common)
        attention = [partial(rgma, heads=h, qk_dim=d) for h, d in zip(heads, qk_dim, strict=True)]
        blocks: list[Callable[..., nn.Module]] = [elrf, elrf, *attention]
        drop_rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        self.stem = Stem(in_chans, dims[0], stem, act)
        self.stages = nn.Sequential()
        for i in range(STAGES):
            downsample = ConvBN(dims[i - 1], dims[i], 3, stride=2) if i else nn.Identity()
            mixers = [blocks[i](dims[i], ffn_ratio[i], next(drop_rates)) for _ in range(depths[i])]
            self.stages.append(Stage(downsample, mixers))
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.in_chans = in_chans
        self.distill_head = distill_head
        self.distilled_training = False
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, Residual):
                module.start_branch_at(branch_scale)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, in_chans, H, W) to logits (B, num_classes), or the other outputs of :meth:`forward_head`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to the last map (B, C4, ceil(H/32), ceil(W/32))."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pool (B, C4, H, W) and classify: global average pool -> BatchNorm1d -> Linear [family: iFormer, RepViT].

        Returns:
            (B, num_classes); (B, C4) with ``pre_logits`` or without classes; ``x`` itself with ``global_pool=""``; a
            pair of (B, num_classes) in training after :meth:`set_distilled_training`.
        """
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Map (B, in_chans, H, W) to the maps of the stages, (B, C_i, ceil(H / 2^(i+1)), ceil(W / 2^(i+1))) for i = 1..4.

        The arguments are timm's; ``norm`` has no effect, as there is no norm after a stage.

        Args:
            indices: stages to return: the last n if an int, all if None, else these (negative from the end).
            stop_early: do not run the stages after the last one asked for.
            intermediates_only: return the list of maps instead of (last map that ran, list of maps).

        Raises:
            ValueError, AssertionError: another ``output_fmt``; an index out of range.
        """
        _check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the stages in ``indices`` do not need, in place; return their indices counted from the front.

        The arguments are as in :meth:`forward_intermediates`; the classifier goes anyway when the last stage does.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        shortened = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """Return the ``Classifier``, or an ``Identity`` without classes, or a ``Linear`` after :meth:`fuse`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one for ``num_classes`` (0: none).

        Raises:
            ValueError: ``num_classes`` is negative, or ``global_pool`` is neither "avg" nor "", or is "" with classes.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        _check(num_classes >= 0, "num_classes", num_classes, "an integer >= 0")
        _check_choice("global_pool", global_pool, ("avg", ""))
        _check(bool(global_pool) or not num_classes, "global_pool", global_pool, "'avg', or '' with num_classes=0")
        self.num_classes = num_classes
        self.global_pool = global_pool
        head = Classifier(self.num_features, num_classes, self.distill_head) if num_classes else nn.Identity()
        self.head = head.apply(_init_weights).to(next(self.stem.parameters())).train(self.training)
        self.set_distilled_training(self.distilled_training)

    def set_distilled_training(self, enable: bool = True) -> None:
        """With ``distill_head``, return the outputs of both heads in training mode instead of their mean."""
        self.distilled_training = enable
        if isinstance(self.head, Classifier):
            self.head.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, to save memory; running BatchNorm statistics then move twice per step."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer-wise learning rates: stem, then stages (``coarse``) or blocks."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Return the layer scales, which get no weight decay; timm itself exempts norms and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".gamma")}

    @torch.no_grad()
    def fuse(self) -> "ReGLA":
        """Fold every BatchNorm, merge parallel branches and heads, drop DropPath, in place; return self.

        The outputs stay the same up to rounding. Idempotent [family: RepViT, FastViT].

        Raises:
            RuntimeError: the model is in training mode, where BatchNorm does not use its running statistics.
        """
        if self.training:
            raise RuntimeError("fuse() folds running statistics, which training mode does not use: call eval() first")
        return fuse_children(self)


def _init_weights(module: nn.Module) -> None:
    """Convolutions and linears: truncated normal, std 0.02, bias 0 [family: iFormer]."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _per_attention_stage(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _check(valid: bool, field: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{field}={value!r} is not valid: it must be {wanted}")


def _check_choice(field: str, value: object, options: Sequence[object]) -> None:
    _check(value in options, field, value, "one of " + ", ".join(map(repr, options)))


def _check_shape(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], ffn_ratio: Sequence[float], qk_dim: Sequence[int]
) -> None:
    _check(len(dims) == STAGES and all(dim >= 1 for dim in dims), "dims", dims, "four integers >= 1")
    _check(dims[0] % 2 == 0, "dims", dims, "even in its first entry, which the stem halves")
    _check(len(depths) == STAGES and all(depth >= 1 for depth in depths), "depths", depths, "four integers >= 1")
    _check(len(heads) == 2 and all(h >= 1 for h in heads), "heads", heads, "one or two integers >= 1")
    divides = all(dim % h == 0 for dim, h in zip(dims[2:], heads, strict=True))
    _check(divides, "heads", heads, f"divisors of the last two dims, {dims[2]} and {dims[3]}")
    _check(len(qk_dim) == 2 and all(d >= 1 for d in qk_dim), "qk_dim", qk_dim, "one or two integers >= 1")
    wide_enough = len(ffn_ratio) == STAGES and all(int(r * c) >= 1 for r, c in zip(ffn_ratio, dims, strict=True))
    _check(wide_enough, "ffn_ratio", ffn_ratio, "four numbers > 0, each giving at least one hidden channel")


def _check_kernels(elrf_kernels: Sequence[int], cpe_kernel: int) -> None:
    odd = all(kernel >= 3 and kernel % 2 == 1 for kernel in elrf_kernels)
    _check(len(elrf_kernels) == 2 and odd, "elrf_kernels", elrf_kernels, "two odd integers >= 3")
    _check(cpe_kernel == 0 or (cpe_kernel >= 3 and cpe_kernel % 2 == 1), "cpe_kernel", cpe_kernel, "0 or odd and >= 3")


_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.95,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv1.conv",
    "classifier": ("head.main.linear", "head.distill.linear"),
    "paper_ids": "arXiv:2602.05262",
    "paper_name": "ReGLA: Efficient Receptive-Field Modeling with Gated Linear Attention Network",
}

# All [ours]. M is narrower in stages 1 and 2 and wider in stage 4's FFN than its first prototype (dims 48, 96, 192, 384;
# depths 1, 2, 8, 3; FFN ratio 3): equal parameters, 0.75 of the MACs, see docs/results.md.
# Drop path: L as iFormer-M [family], XL [ours].
SIZES: dict[str, dict[str, Any]] = {
    "regla_t": {"dims": (32, 64, 128, 256), "depths": (1, 1, 7, 2), "heads": (2, 4), "ffn_ratio": (3, 3, 3, 2)},
    "regla_s": {"dims": (32, 64, 192, 320), "depths": (1, 2, 6, 3), "heads": (3, 5)},
    "regla_m": {"dims": (32, 64, 192, 384), "depths": (1, 2, 6, 3), "heads": (3, 6), "ffn_ratio": (3, 3, 3, 4)},
    "regla_l": {"dims": (48, 96, 256, 448), "depths": (1, 2, 10, 3), "heads": (4, 7), "drop_path": 0.1},
    "regla_xl": {"dims": (64, 128, 320, 512), "depths": (2, 2, 11, 4), "heads": (5, 8), "drop_path": 0.2},
}

default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in SIZES})


def _create_regla(variant: str, pretrained: bool, **kwargs: Any) -> ReGLA:
    # The name in timm's scripts.
    if "drop_path_rate" in kwargs:
        kwargs["drop_path"] = kwargs.pop("drop_path_rate")
    return build_model_with_cfg(
        ReGLA,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(STAGES))},
        **{**SIZES[variant], **kwargs},
    )


@register_model
def regla_t(pretrained: bool = False, **kwargs: Any) -> ReGLA:
    """ReGLA-T: 2.95 M parameters fused, 0.44 GMACs at 224 px. ``kwargs``: the arguments of :class:`ReGLA`."""
    return _create_regla("regla_t", pretrained, **kwargs)


@register_model
def regla_s(pretrained: bool = False, **kwargs: Any) -> ReGLA:
    """ReGLA-S: 6.47 M parameters fused, 0.81 GMACs at 224 px. ``kwargs``: the arguments of :class:`ReGLA`."""
    return _create_regla("regla_s", pretrained, **kwargs)


@register_model
def regla_m(pretrained: bool = False, **kwargs: Any) -> ReGLA:
    """ReGLA-M: 8.89 M parameters fused, 0.93 GMACs at 224 px. ``kwargs``: the arguments of :class:`ReGLA`."""
    return _create_regla("regla_m", pretrained, **kwargs)


@register_model
def regla_l(pretrained: bool = False, **kwargs: Any) -> ReGLA:
    """ReGLA-L: 14.70 M parameters fused, 2.06 GMACs at 224 px. ``kwargs``: the arguments of :class:`ReGLA`."""
    return _create_regla("regla_l", pretrained, **kwargs)


@register_model
def regla_xl(pretrained: bool = False, **kwargs: Any) -> ReGLA:
    """ReGLA-XL: 24.86 M parameters fused, 3.70 GMACs at 224 px. ``kwargs``: the arguments of :class:`ReGLA`."""
    return _create_regla("regla_xl", pretrained, **kwargs)
