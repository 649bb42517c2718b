"""How features are stored: encoded by the writer on the host, decoded on the training device in one call per batch.

A codec turns features [N, ...] into N rows of equal length in bytes, which Parquet keeps as ``fixed_size_binary`` (six
times cheaper to read than list columns). Imports neither Ray nor MLflow.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def row_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of one stored row of features of `shape` (without the batch dimension)."""
    _check(codec)
    return 2 * math.prod(shape)


def encode(codec: str, features: Tensor) -> np.ndarray:
    """Encode float32 features.

    Args:
        codec: ``float16`` (IEEE half, little endian).
        features: [N, ...] float32 on any device.

    Returns:
        [N, row_bytes] uint8 on the host.

    Raises:
        ValueError: for features that are not finite, or too large for the codec.
    """
    _check(codec)
    if not torch.isfinite(features).all():
        raise ValueError("features that are not finite (NaN or infinity)")
    half = features.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"features up to {features.abs().max().item():.3g}, too large for the codec {codec}")
    return half.cpu().contiguous().view(torch.uint8).reshape(len(features), -1).numpy()


def decode(codec: str, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Decode stored rows on the device they are on.

    Args:
        rows: [N, row_bytes] uint8.
        shape: of one row's features.

    Returns:
        [N, *shape] float32.
    """
    _check(codec)
    return rows.view(torch.float16).view(len(rows), *shape).float()


def fidelity(codec: str, features: Tensor) -> float:
    """Mean cosine between features [N, ..., D] and what the codec keeps of them."""
    kept = decode(codec, torch.from_numpy(encode(codec, features)), tuple(features.shape[1:]))
    return torch.nn.functional.cosine_similarity(features.cpu(), kept, dim=-1).mean().item()


def _check(codec: str) -> None:
    if codec != "float16":
        raise ValueError(f"unknown codec {codec}; there is float16")
