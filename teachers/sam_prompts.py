"""SAM's prompt encoder (Kirillov et al. 2023, "Segment Anything", appendix A): points and boxes as tokens.

A position is encoded by sines and cosines of random projections (Tancik et al. 2020); its label adds a learned vector. A box is
its two corners. Masks as prompts are not built: `no_mask_embed` stands in their place.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

PADDING, OFF, ON, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""Labels of a point: none at all, not on the object, on the object, and the corners of a box."""


class PositionEncoding(nn.Module):
    """Random Fourier features of a position; `positional_encoding_gaussian_matrix` [2, D / 2] holds the frequencies."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, positions: Tensor) -> Tensor:
        """(x, y) [..., 2] as shares of the image -> [..., D]."""
        with torch.autocast(positions.device.type, enabled=False):  # 16-bit angles would move a point by several pixels
            angles = 2 * math.pi * (2 * positions - 1) @ self.positional_encoding_gaussian_matrix
            return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points and boxes -> tokens of `dim` channels.

    The names of its parts are those of the authors' checkpoints.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe_layer = PositionEncoding(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.no_mask_embed = nn.Embedding(1, dim)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            points: (x, y) [..., P, 2] as shares of the image.
            labels: [..., P] int64: 1 on the object, 0 not on it, 2 and 3 the top left and bottom right corner of a box,
                -1 padding. The authors pad points without a box by one.

        Returns:
            [..., P, D].
        """
        kinds = torch.cat(
            [self.not_a_point_embed.weight, *(cast(nn.Embedding, kind).weight for kind in self.point_embeddings)]
        )
        positions = torch.where((labels == PADDING)[..., None], 0.0, self.pe_layer(points))
        return positions + kinds[labels + 1]

    def grid(self, height: int, width: int) -> Tensor:
        """The encoded centres of a grid over the image: [height * width, D], row-major."""
        device = self.no_mask_embed.weight.device
        down, right = ((torch.arange(side, device=device) + 0.5) / side for side in (height, width))
        rows, columns = torch.meshgrid(down, right, indexing="ij")
        encoded: Tensor = self.pe_layer(torch.stack([columns, rows], dim=-1).flatten(0, 1))
        return encoded
