"""SAM image encoders (Kirillov et al. 2023, "Segment Anything") through timm: `sam[/<variant>]`.

There is no summary. Patches are the neck's 256 channels; at 1024 px the 64 x 64 grid is averaged exactly to 16 x 16.
For a smaller input the squares shrink with it: the grid stays 16 x 16 as long as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import Attention, checkpoint_filter_fn, get_rel_pos
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOptions
from teachers.timm_backbone import TimmTeacher
from teachers.variants import choose_variant

VARIANTS = {f"vit_{size[0]}": f"samvit_{size}_patch16.sa1b" for size in ("base", "large", "huge")}
DEFAULT = "vit_b"
INPUT_SIZE = 1024
PATCH = 16
GRID = 16
NORM_EPS = 1e-6
FLASH_CHANNELS = 256
"""Of a head, that FlashAttention takes at most."""


class SAM(TimmTeacher):
    """A SAM image encoder with the authors' epsilon in every norm; timm's own is 1e-5 in the blocks."""

    def _create(self, **changes: Any) -> nn.Module:
        model = super()._create(**changes)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = NORM_EPS
            if type(module) is Attention and module.use_rel_pos:
                module.__class__ = FusedAttention
        return model


class FusedAttention(Attention):
    """timm's attention, on a GPU without its table of N x N biases and weights a head: at 1024 px that is 400 MB an image.

    A kernel that needs no such table knows of no bias. But SAM's is a product of the query, with the embedding of the rows
    and of the columns that lie between it and the key: so it goes into the product of query and key
    (:func:`with_positions`). On a CPU, where the longer product takes longer than the table, timm's own way is taken.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D]."""
        if not _pays(x):
            attended: Tensor = super().forward(x)
            return attended
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tables = (get_rel_pos(side, side, table) for side, table in ((height, self.rel_pos_h), (width, self.rel_pos_w)))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = with_positions(q * self.scale, k, *(table / self.scale for table in tables))
        channels, length = v.shape[-1], q.shape[-1]
        # FlashAttention is for 16-bit numbers, and wants all of one length.
        flash = v.dtype != torch.float32 and length <= FLASH_CHANNELS
        padded = F.pad(v, (0, length - channels)) if flash else v
        out = F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., :channels]
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
        return projected


def _pays(x: Tensor) -> bool:
    return x.is_cuda


def with_positions(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is ``q @ k.T`` and the bias of decomposed relative positions (Li et al. 2022, MViTv2, 4.1).

    A query is continued by what it says of every row and of every column, a key by the one-hot codes of its own.

    Args:
        q, k: [B, heads, H * W, C], places row by row.
        rows, columns: [H, H, C] and [W, W, C], embeddings by the query's and the key's row, and column.

    Returns:
        Both [B, heads, H * W, C + H + W], and zeros to a multiple of eight.
    """
    height, width = len(rows), len(columns)
    spare = -(q.shape[-1] + height + width) % 8
    grid = q.unflatten(2, (height, width))
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows)
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns)
    nothing = grid.new_zeros(*grid.shape[:-1], spare)
    place = torch.arange(height * width, device=k.device)
    codes = torch.cat([F.one_hot(place // width, height), F.one_hot(place % width, width + spare)], dim=-1).to(k.dtype)
    queries = torch.cat([grid, of_rows, of_columns, nothing], dim=-1).flatten(2, 3)
    return queries, torch.cat([k, codes.expand(*k.shape[:2], -1, -1)], dim=-1)


def sam(options: TeacherOptions) -> Teacher:
    """Factory of SAM; without a variant it is ViT-B.

    `weights` may be a file in timm's layout or in the authors' own, whose prompt encoder and mask decoder are left out.
    """
    variant, model = choose_variant("sam", options.variant, VARIANTS, DEFAULT)
    size = options.input_size or INPUT_SIZE
    side = size // PATCH
    pool = side // GRID if side >= GRID and side % GRID == 0 else 1
    # The tables are made for the published size; timm resamples them to the input's in every forward.
    options = replace(options, args={"img_size": INPUT_SIZE, **options.args})
    return SAM(f"sam/{variant}", model, options, has_summary=False, pool=pool, key_filter=_to_timm)


def _to_timm(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(tensors, model)
    return converted
