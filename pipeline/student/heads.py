"""Heads that map student features to a teacher's: one per teacher and kind of feature, not exported by default."""

from torch import nn


def distillation_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, LayerNorm, Linear over the last dimension: [..., in_dim] -> [..., out_dim].

    Two layers as in UNIC (Sariyildiz et al. 2024) and EUPE; the norms keep large-scale teachers from dominating the hidden layer.
    """
    return nn.Sequential(
        nn.LayerNorm(in_dim),
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.LayerNorm(hidden_dim),
        nn.Linear(hidden_dim, out_dim),
    )
