"""The parts that published image encoders are made of, in plain torch over a dict of tensors: nothing of timm or open_clip.

The networks themselves are put together in the tests, over the keys of the original authors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights of which every single one shows in the output: no zero bias, no unit gain."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            noise *= 2 * (noise.numel() / shape[0]) ** -0.5
        elif key.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
            noise = 1 + noise / 4
        else:
            noise /= 3
        tensors[key] = noise
    return tensors


def draw_pixels(batch: int, size: int, seed: int = 0) -> Tensor:
    """[batch, 3, size, size] uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)


def normalise(pixels: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    return torch.stack([(pixels[:, c].float() / 255 - mean[c]) / std[c] for c in range(3)], dim=1)


def linear(w: Mapping[str, Tensor], key: str, x: Tensor) -> Tensor:
    return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]


def norm(w: Mapping[str, Tensor], key: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]


def attend(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention head by head over [B, N, 3 D] queries, keys and values.

    Args:
        bias: [B, heads, N, N] added to the logits.
    """
    outputs = []
    for head, (q, k, v) in enumerate(split_heads(qkv, heads)):
        logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        outputs.append((logits if bias is None else logits + bias[:, head]).softmax(dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


def split_heads(qkv: Tensor, heads: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values [B, N, D / heads] of every head."""
    q, k, v = (part.chunk(heads, dim=-1) for part in qkv.chunk(3, dim=-1))
    return list(zip(q, k, v, strict=True))


def resample_with_offset(table: Tensor, side: int, offset: float) -> Tensor:
    """A square table of positions [N, D] to side^2 rows, by cubic convolution (Keys 1981; a = -0.75) without antialiasing.

    Place i of the new grid is at (i + 1/2) / s - 1/2 of the old one, s = (side + offset) / old; beyond its edge the old
    grid repeats its last row or column.
    """
    old = round(len(table) ** 0.5)
    if old == side:
        return table
    weights = torch.zeros(side, old)
    for i in range(side):
        at = (i + 0.5) * old / (side + offset) - 0.5
        first = int(at // 1) - 1
        for place in range(first, first + 4):
            weights[i, min(max(place, 0), old - 1)] += _cubic(abs(at - place))
    grid = table.reshape(old, old, -1)
    return torch.einsum("ir,jc,rcd->ijd", weights, weights, grid).flatten(0, 1)


def _cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resample(table: Tensor, side: int) -> Tensor:
    """A square table of positions [N, D] to side^2 rows, bicubic and antialiased."""
    old = round(len(table) ** 0.5)
    grid = table.T.reshape(1, -1, old, old)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T
