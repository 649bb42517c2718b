"""SAM's mask decoder (Kirillov et al. 2023, "Segment Anything", appendix A): tokens and the image attend to each other.

Tokens for the masks and their quality join those of the prompts. In each of two blocks the tokens attend to themselves and to
the image, pass a perceptron, and the image attends to the tokens. A last attention reads the image; then each mask is the
product of the upscaled image with a vector that a perceptron makes of the mask's token.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8
"""Of every attention in all published files; the shapes of the tensors do not tell it."""


class Projected(nn.Module):
    """Attention over `inner` channels, of queries, keys and values of `dim` channels."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, N, D], [B, M, D] and [B, M, D] -> [B, N, D]."""
        q, k, v = (
            project(part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project, part in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        mixed: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class TwoLayers(nn.Module):
    """A perceptron with one hidden layer and ReLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        changed: Tensor = self.lin2(F.relu(self.lin1(tokens)))
        return changed


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image to the tokens.

    Args:
        first: whether tokens are their own position codes and the result of their attention replaces them, as in the first block.
    """

    def __init__(self, dim: int, inner: int, hidden: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Projected(dim, dim)
        self.cross_attn_token_to_image = Projected(dim, inner)
        self.mlp = TwoLayers(dim, hidden)
        self.cross_attn_image_to_token = Projected(dim, inner)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, codes: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] with codes [B, N, D], image [B, M, D] with places [M, D] -> both."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            tokens = tokens + self.self_attn(tokens + codes, tokens + codes, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + codes, image + places, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + places, tokens + codes, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """`depth` blocks and a last attention of the tokens to the image."""

    def __init__(self, dim: int, inner: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, inner, hidden, first=number == 0) for number in range(depth))
        self.final_attn_token_to_image = Projected(dim, inner)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D], image [B, M, D] and its positions [M, D] -> tokens and image."""
        codes = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, codes, places)
        read = self.final_attn_token_to_image(tokens + codes, image + places, image)
        return self.norm_final_attn(tokens + read), image


class Perceptron(nn.Module):
    """Linear layers with ReLU between them, of these widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, values: Tensor) -> Tensor:
        """[..., widths[0]] -> [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            values = F.relu(layer(values))
        last: Tensor = self.layers[-1](values)
        return last


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MaskDecoder(nn.Module):
    """Tokens of prompts and the embedding of an image -> masks and their predicted IoU.

    The names of its parts are those of the authors' checkpoints.

    Args:
        dim: channels D of tokens and image, divisible by 8.
        inner: channels of the attention between tokens and image.
        hidden: channels of the perceptron in a block.
        depth: blocks.
        masks: number M of masks: one for a prompt without doubt, then those of a doubtful one.
        iou_hidden: channels of the perceptron that predicts the IoU.
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        inner: int = 128,
        hidden: int = 2048,
        depth: int = 2,
        masks: int = 4,
        iou_hidden: int = 256,
        iou_depth: int = 3,
    ) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim, inner, hidden, depth)
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, 2),
            ChannelNorm(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Perceptron(dim, dim, dim, dim // 8) for _ in range(masks))
        self.iou_prediction_head = Perceptron(dim, *[iou_hidden] * (iou_depth - 1), masks)

    def forward(self, image: Tensor, places: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Decode masks.

        Args:
            image: [B, D, h, w], a mask prompt's embedding already added.
            places: [h * w, D], the encoded positions of the grid.
            prompts: [B, P, D].

        Returns:
            Logits [B, M, 4 h, 4 w] and predicted IoU [B, M].
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(prompts.shape[0], -1, -1), prompts], dim=1)
        found, flat = self.transformer(tokens, image.flatten(2).transpose(1, 2), places)
        upscaled = self.output_upscaling(flat.transpose(1, 2).unflatten(2, image.shape[-2:]))
        vectors = torch.stack(
            [make(found[:, number]) for number, make in enumerate(self.output_hypernetworks_mlps, start=1)], dim=1
        )
        logits = torch.einsum("bmc,bchw->bmhw", vectors, upscaled)
        return logits, self.iou_prediction_head(found[:, 0])
