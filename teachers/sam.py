"""SAM image encoders (Kirillov et al. 2023, "Segment Anything") through timm: `sam[/<variant>]`.

There is no summary. Patches are the neck's 256 channels; at 1024 px the 64 x 64 grid is averaged exactly to 16 x 16.
At smaller inputs fewer patches are averaged, so that the grid stays 16 x 16 where possible.

Images are resized bilinearly, as by the authors, but squashed to a square, as by all teachers. With the argument
`resize_mode: pad` their ratio is kept and they are padded, as by the authors; the image's part of the feature map is then
averaged to the same grid, so that no padding enters a feature. A square image is the same either way.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import Attention, checkpoint_filter_fn, get_rel_pos
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOptions
from teachers.sam_layout import to_authors
from teachers.timm_backbone import TimmTeacher
from teachers.variants import choose_variant

VARIANTS = {f"vit_{size[0]}": f"samvit_{size}_patch16.sa1b" for size in ("base", "large", "huge")}
DEFAULT = "vit_b"
INPUT_SIZE = 1024
PATCH = 16
GRID = 16
NORM_EPS = 1e-6
FLASH_CHANNELS = 256
"""Most channels per head that FlashAttention accepts."""


class SAM(TimmTeacher):
    """A SAM image encoder with the authors' epsilon in every norm; timm's own is 1e-5 in the blocks."""

    def __init__(self, name: str, model_name: str, options: TeacherOptions, *, pool: int = 1) -> None:
        options = replace(options, args={"interpolation": "bilinear", **options.args})
        super().__init__(name, model_name, options, has_summary=False, pool=pool, key_filter=_to_timm)

    def _create(self, **changes: Any) -> nn.Module:
        model = super()._create(**changes)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                module.eps = NORM_EPS
            elif isinstance(module, Attention) and module.use_rel_pos:
                model.set_submodule(name, FusedAttention(module))
        return model


class FusedAttention(Attention):
    """timm's attention, on a GPU without its N x N biases and weights per head, which take 400 MB per image at 1024 px.

    SAM's bias is a product of the query with embeddings of the relative row and column, so fused kernels can compute it in
    the product of query and key (:func:`with_positions`). On a CPU that is slower than timm's forward, which is used there.

    Args:
        plain: attention with relative positions, whose layers and tables this module takes over.
    """

    def __init__(self, plain: Attention) -> None:
        with torch.device("meta"):
            super().__init__(plain.proj.in_features, plain.num_heads, use_rel_pos=True, input_size=(1, 1))
        self.qkv, self.q_norm, self.k_norm, self.proj = plain.qkv, plain.q_norm, plain.k_norm, plain.proj
        self.rel_pos_h, self.rel_pos_w = plain.rel_pos_h, plain.rel_pos_w
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D]."""
        if not _use_fused(x):
            attended: Tensor = super().forward(x)
            return attended
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tables = (get_rel_pos(side, side, table) for side, table in ((height, self.rel_pos_h), (width, self.rel_pos_w)))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = with_positions(q * self.scale, k, *(table / self.scale for table in tables))
        channels, length = v.shape[-1], q.shape[-1]
        # FlashAttention takes 16-bit numbers, and queries, keys and values of one length.
        flash = v.dtype != torch.float32 and length <= FLASH_CHANNELS
        padded = F.pad(v, (0, length - channels)) if flash else v
        out = F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., :channels]
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
        return projected


def _use_fused(x: Tensor) -> bool:
    return x.is_cuda


def with_positions(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is ``q @ k.T`` plus the bias of decomposed relative positions (Li et al. 2022, MViTv2, 4.1).

    Each query is extended by its products with the embeddings of every row and column, each key by the one-hot codes of its
    own row and column.

    Args:
        q, k: [B, heads, H * W, C], positions in row-major order.
        rows, columns: [H, H, C] and [W, W, C], embeddings by the query's and the key's row, and column.

    Returns:
        Both [B, heads, H * W, C + H + W], zero-padded to a multiple of eight channels.
    """
    height, width = len(rows), len(columns)
    spare = -(q.shape[-1] + height + width) % 8
    grid = q.unflatten(2, (height, width))
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows)
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns)
    padding = grid.new_zeros(*grid.shape[:-1], spare)
    position = torch.arange(height * width, device=k.device)
    codes = torch.cat([F.one_hot(position // width, height), F.one_hot(position % width, width + spare)], dim=-1)
    queries = torch.cat([grid, of_rows, of_columns, padding], dim=-1).flatten(2, 3)
    return queries, torch.cat([k, codes.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)


def sam(options: TeacherOptions) -> Teacher:
    """Factory of SAM; the default variant is ViT-B.

    `weights` may be a file with timm's keys, the authors' or those of transformers; prompt encoder and mask decoder are ignored.
    """
    variant, model = choose_variant("sam", options.variant, VARIANTS, DEFAULT)
    size = options.input_size or INPUT_SIZE
    side = size // PATCH
    pool = side // GRID if side >= GRID and side % GRID == 0 else 1
    # The tables have the published size; timm resamples them to the input's in every forward pass.
    options = replace(options, args={"img_size": INPUT_SIZE, **options.args})
    return SAM(f"sam/{variant}", model, options, pool=pool)


def _to_timm(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    converted: Mapping[str, Tensor] = checkpoint_filter_fn(to_authors(tensors), model)
    return converted
