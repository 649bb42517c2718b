"""The blocks of ReGLA: linear attention, RGMA, ELRF, stem and stage. All maps are (B, C, H, W).

Marks in the docstrings are those of `layers.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from pipeline.student.layers import ACTIVATIONS, FFN, ConvBN, RepDW, Residual

GATES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "silu": nn.SiLU, "hardsigmoid": nn.Hardsigmoid}
NO_GATE = "none"
# A head whose K is all zero gives 0 / 0.001 instead of 0 / 0; K is of order one after its BatchNorm.
K_FLOOR = 1e-3
SMALLEST_HALF = 2.0**-24


def attend(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-3) -> Tensor:
    """Linear attention with non-negative features: out_n = V K^T q_n / (sum_m k_m . q_n), in O(N).

    The form is EfficientViT's ReLU linear attention (arXiv 2205.14756, LiteMLA) [family]; the arrangement below is
    [ours] and safe in half precision, where the textbook sums overflow or divide 0 by 0:

    - K is scaled by N^-1/2, so that sums over tokens grow like sqrt(N) instead of N; they accumulate in float32;
    - numerator and denominator are divided by the mean of the denominator vector, so the scale of K cancels (a traced graph
      with a fixed N is right at other sizes too) and ``eps`` is relative to it;
    - the weights are non-negative and sum to less than 1, so |out| <= max |v|. A token whose q is all zero, and every
      token of a head whose K is all zero, gets 0;
    - in float16, queries above 1 are divided by their largest channel and ``eps`` with them, and K by its largest value:
      both cancel, and the sums over channels, up to d * max(q), would leave the range.

    A query with sum(q) near ``eps`` is pulled towards zero; after BatchNorm and ReLU the sum is typically above 10.
    float16 stays finite for any finite q and k while max(sqrt(N), d) * max|v| < 65504.

    Args:
        q, k, v: queries and keys (B, h, d, N), >= 0, and values (B, h, e, N), of one floating dtype.
        eps: added to the denominator.

    Returns:
        (B, h, e, N), dtype of the inputs (the autocast dtype under autocast).
    """
    if k.dtype == torch.float16:
        k = k / k.amax((-2, -1), keepdim=True).clamp_min(1)
    k = k * k.shape[-1] ** -0.5
    z = k.sum(-1, dtype=torch.promote_types(k.dtype, torch.float32)).unsqueeze(-2)
    s = v @ k.transpose(-1, -2)
    half = s.dtype == torch.float16  # under autocast q and k may not be
    scale = z.mean(-1, keepdim=True) + K_FLOOR
    # One matrix (B, h, e + 1, d) for numerator and denominator: one product with Q instead of two.
    s = (torch.cat([s.to(z.dtype), z], -2) / scale).to(q.dtype)
    if half:
        largest = q.amax(-2, keepdim=True).clamp_min(1)
        q = q / largest
    o = s @ q
    # In float16, eps / largest may round to 0.
    floor = (eps / largest).clamp_min(SMALLEST_HALF).to(o.dtype) if half else eps
    return o[..., :-1, :] / (o[..., -1:, :] + floor)


class RGMA(nn.Module):
    """ReLU-gated modulated attention: (B, C, H, W) -> (B, C, H, W), linear in H * W.

    With N = H * W, h heads, d query channels and e = C / h value channels per head:

        [Q|K] = ReLU(BN(W_qk X))                      (1)  [paper: ReLU-based, softmax-free, linear in tokens]
        V     = BN(W_v X)                             (2)  signed [ours]; iFormer puts its sigmoid here
        A     = attend(Q, K, V)                       (3)-(4)  [family: EfficientViT]
        M     = BN(DW_local(V))                       (5)  local term [family: MLLA, FLatten]; see below
        Y     = BN(W_o ((A + M) * gate(BN(W_g X))))   (6)  [paper: gated]; on the output [family: iFormer SHMA]

    M restores the rank that linear attention (rank <= d) loses ([paper]: "enhances local feature representation").

    Args:
        heads: heads h, a divisor of C; h = C / 64 in the sizes shipped [ours].
        qk_dim: query and key channels d per head; 32 in the sizes shipped [ours].
        local_kernel: kernel of the local term, 0 leaves it out.
        gate_act: a key of ``GATES``, or "none" to leave the gate out (for ablation).
    """

    def __init__(
        self, dim: int, heads: int, qk_dim: int = 32, local_kernel: int = 3, gate_act: str = "sigmoid"
    ) -> None:
        super().__init__()
        self.heads = heads
        # Per head [q(d) | k(d)], so that batch and head merge without a copy; V is a convolution of its own, so that it is
        # contiguous for the local term [ours].
        self.qk = nn.Sequential(ConvBN(dim, 2 * heads * qk_dim), nn.ReLU())
        self.v = ConvBN(dim, dim)
        self.local = ConvBN(dim, dim, local_kernel, groups=dim) if local_kernel else None
        self.gate = None if gate_act == NO_GATE else nn.Sequential(ConvBN(dim, dim), GATES[gate_act]())
        # Registered last: Residual folds layer scale into the last ConvBN of its branch.
        self.proj = ConvBN(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), same dtype."""
        v = self.v(x)
        q, k = self._split_heads(self.qk(x)).chunk(2, dim=2)
        y = attend(q, k, self._split_heads(v)).reshape(v.shape)
        if self.local is not None:
            y = y + self.local(v)
        if self.gate is not None:
            y = y * self.gate(x)
        return self.proj(y)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, h * c, H, W) -> (B, h, c, N)."""
        return x.flatten(2).unflatten(1, (self.heads, -1))


class RGMABlock(nn.Module):
    """Block of stages 3 and 4: CPE, then RGMA, then FFN, each residual: (B, C, H, W) -> (B, C, H, W).

    CPE is a depthwise convolution with residual [paper]; 3x3 with BatchNorm [family: iFormer RepCPE]. FFN ratio 3
    [family: iFormer].

    Args:
        cpe_kernel: kernel of the CPE, 0 leaves it out (for ablation).
        **attention: the arguments of :class:`RGMA` after ``dim``.
    """

    def __init__(
        self,
        dim: int,
        ffn_ratio: float,
        drop_path: float = 0.0,
        *,
        cpe_kernel: int = 3,
        act: str = "hardswish",
        layer_scale: float | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.cpe = RepDW(dim, cpe_kernel, identity=True) if cpe_kernel else nn.Identity()
        self.attn = Residual(RGMA(dim, **attention), dim, drop_path, layer_scale)
        self.ffn = Residual(FFN(dim, ffn_ratio, act), dim, drop_path, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), same dtype."""
        return self.ffn(self.attn(self.cpe(x)))


class ELRF(nn.Module):
    """Efficient large receptive field, the block of stages 1 and 2: (B, C, H, W) -> (B, C, H, W).

        y = x + BN(DW3x3(x))
        y = y + FFN(y)
        z = y + FFN(y) with BN(DW5x5(.)) in it

    A 3x3 and a 5x5 depthwise convolution with an FFN between them replace one 7x7 [2nd]: same receptive field, 34 taps
    instead of 49. Training adds a 1x1 branch beside the 3x3 and a 3x3 beside the 5x5 [family: RepViT, UniRepLKNet].

    Args:
        mode: where the second depthwise convolution is. "in": in front of the expansion, on C channels ([ours]: our
            reading of [2nd] "integrated within another FFN"); "mid": on the hidden channels, before the activation
            [family: Mix-FFN of SegFormer], +16 % latency at 512 px; "pre": residual by itself, in front of the FFN.
        reparam: add the smaller parallel branches in training.
    """

    def __init__(
        self,
        dim: int,
        ffn_ratio: float,
        drop_path: float = 0.0,
        *,
        mode: str = "in",
        kernels: tuple[int, int] = (3, 5),
        reparam: bool = True,
        act: str = "hardswish",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        near_small, far_small = (kernel - 2 if reparam else 0 for kernel in kernels)
        far_dim = int(ffn_ratio * dim) if mode == "mid" else dim
        far = RepDW(far_dim, kernels[1], far_small, identity=mode == "pre")
        self.near = RepDW(dim, kernels[0], near_small, identity=True)
        self.ffn1 = Residual(FFN(dim, ffn_ratio, act), dim, drop_path, layer_scale)
        self.far = far if mode == "pre" else nn.Identity()
        wide_ffn = FFN(dim, ffn_ratio, act, before=far if mode == "in" else None, inside=far if mode == "mid" else None)
        self.ffn2 = Residual(wide_ffn, dim, drop_path, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), same dtype."""
        return self.ffn2(self.far(self.ffn1(self.near(x))))


class Stem(nn.Sequential):
    """Two stride-2 3x3 convolutions: (B, in_chans, H, W) -> (B, dim, ceil(H/4), ceil(W/4)).

    "conv" [family: RepViT]: in_chans -> dim/2 -> dim. "fused_ib": in_chans -> dim/2 -> 2 dim, then 1x1 to dim; closer
    to iFormer's stem, +0.25 GMACs at 512 px for size M.
    """

    def __init__(self, in_chans: int, dim: int, kind: str = "conv", act: str = "hardswish") -> None:
        super().__init__()
        wide = 2 * dim if kind == "fused_ib" else dim
        self.conv1 = ConvBN(in_chans, dim // 2, 3, stride=2)
        self.act1 = ACTIVATIONS[act]()
        self.conv2 = ConvBN(dim // 2, wide, 3, stride=2)
        if kind == "fused_ib":
            self.act2 = ACTIVATIONS[act]()
            self.conv3 = ConvBN(wide, dim)


class Stage(nn.Module):
    """Down-sampling (a 3x3 stride-2 ConvBN without activation [family: iFormer], or nothing), then blocks.

    (B, C_in, H, W) -> (B, C, ceil(H/2), ceil(W/2)), or H and W as they are without down-sampling.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage; with ``grad_checkpointing`` the blocks are recomputed in the backward pass."""
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
