"""Storage formats of features: encoded on the writer's device, decoded on the training device in one call per batch.

A codec is named ``[pca[<k>]-]<scalar>[-zstd]``:

``scalar``   ``float32``, ``float16``, ``bfloat16``, or ``int8`` with one float16 scale per token (its largest
             magnitude / 127, rounded up)
``pca<k>``   features are first standardised by channel, and patches projected on their first k principal components;
             ``pca`` alone chooses components and precision from the features (`pipeline/cache/layout/projection.py`)
``zstd``     the Parquet column is compressed, with values stored channel by channel: neighbouring tokens are similar
             in a channel, and features after a ReLU are zero in most channels, which saves a quarter

A row holds an image's features of one token type as bytes, which Parquet stores as ``fixed_size_binary`` (six times
cheaper to read than list columns). Imports neither Ray nor MLflow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError

_GRAMMAR = re.compile(
    r"(?P<pca>pca(?P<components>[1-9]\d*)?-)?(?P<scalar>float32|float16|bfloat16|int8)(?P<zstd>-zstd)?"
)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Codec:
    """A codec, parsed from its name; `components` is None if their number is chosen from the features."""

    scalar: str
    pca: bool = False
    components: int | None = None
    zstd: bool = False

    @classmethod
    def parse(cls, name: str) -> Codec:
        """The codec with this name; UserError if there is no such codec."""
        match = _GRAMMAR.fullmatch(name)
        if match is None:
            raise UserError(
                f"unknown codec {name}; there are float32, float16, bfloat16 and int8, optionally with pca- or pca<k>- "
                f"before and -zstd after, as in pca128-int8-zstd"
            )
        components = match["components"]
        return cls(match["scalar"], bool(match["pca"]), int(components) if components else None, bool(match["zstd"]))

    def build(
        self, shapes: Mapping[str, tuple[int, ...]], projections: Mapping[str, Projection] | None = None
    ) -> dict[str, FeatureCodec]:
        """The feature codec of every token type, given the shapes of one image's features."""
        fitted = projections or {}
        return {kind: FeatureCodec(self.scalar, shape, fitted.get(kind), self.zstd) for kind, shape in shapes.items()}


@dataclass(frozen=True)
class Projection:
    """An affine map of vectors x [D] before they are stored: ``components @ ((x - mean) / scale)``.

    Attributes:
        mean, scale: [D] float32; no scale is 0.
        components: [k, D] float32, orthonormal rows by falling variance; None: the identity.
        step: smallest distance of two int8 values of a token, relative to its root mean square; 0: as fine as int8 allows.
            A coarser step leaves zstd less to store.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor | None = None
    step: float = 0.0


class FeatureCodec(nn.Module):
    """Encodes and decodes one token type, of shape (D,) or (h, w, D), on any device.

    The values of a row are stored token by token or, if `by_channel`, channel by channel.
    """

    mean: Tensor | None
    scale: Tensor | None
    components: Tensor | None
    basis: Tensor | None

    def __init__(
        self, scalar: str, shape: tuple[int, ...], projection: Projection | None = None, by_channel: bool = False
    ) -> None:
        super().__init__()
        self.scalar, self.shape, self.by_channel = scalar, tuple(shape), by_channel
        components = projection.components if projection else None
        self.register_buffer("mean", projection.mean if projection else None, persistent=False)
        self.register_buffer("scale", projection.scale if projection else None, persistent=False)
        self.register_buffer("components", components, persistent=False)
        # What a stored value adds to the features: scaled here, so that decoding is a single product.
        basis = None if projection is None or components is None else components * projection.scale
        self.register_buffer("basis", basis, persistent=False)
        self.step = projection.step if projection else 0.0
        self.width = self.shape[-1] if components is None else len(components)
        self.num_tokens = math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.num_tokens * (self.width * _BYTES[self.scalar] + (2 if self.scalar == "int8" else 0))

    def encode(self, features: Tensor) -> np.ndarray:
        """Encode features [N, *shape] float32 as rows [N, row_bytes] uint8 on the host.

        An ``int8`` row is the float16 scales of all tokens, then the values. Raises ValueError for features that are not
        finite, or too large for the codec.
        """
        values = self.project(features).reshape(len(features), self.num_tokens, self.width)
        if self.scalar == "int8":
            scales, levels = quantised(values, self.step, self.shape[-1])
            parts = [scales, self._ordered(levels)]
        else:
            parts = [self._ordered(values.to(_DTYPES[self.scalar]))]
        if not torch.isfinite(parts[0]).all():  # for int8, the scales are not finite if a value is not
            largest = features.abs().max().item()
            if not math.isfinite(largest):
                raise ValueError("features that are not finite (NaN or infinity)")
            raise ValueError(f"features up to {largest:.3g}, too large for the codec {self.scalar}")
        rows: np.ndarray = torch.cat([part.view(torch.uint8) for part in parts], dim=1).cpu().numpy()
        return rows

    def decode(self, rows: Tensor, positions: Tensor | None = None) -> Tensor:
        """Decode stored rows [N, row_bytes] uint8 to [N, *shape] float32, on their and this module's device.

        Given `positions` [K] int64, only these tokens are decoded, to [N, K, D]; they count row by row of the grid.
        """
        values = self.stored_values(rows, positions)
        kept = values.shape[1]
        if self.basis is not None and self.mean is not None:
            values = torch.addmm(self.mean, values.flatten(0, 1), self.basis)
        elif self.mean is not None and self.scale is not None:
            values = torch.addcmul(self.mean, values, self.scale)
        return values.reshape(len(rows), *(self.shape if positions is None else (kept, self.shape[-1])))

    def stored_values(self, rows: Tensor, positions: Tensor | None = None) -> Tensor:
        """`decode` before the inverse of the projection: [N, tokens, width] float32."""
        if not len(rows):
            rows = rows.new_empty(rows.shape)  # an empty selection may have strides that cannot be viewed
        if self.scalar == "int8":
            scales = rows[:, : 2 * self.num_tokens].contiguous().view(torch.float16).unsqueeze(-1)
            levels = self._by_token(rows[:, 2 * self.num_tokens :].view(torch.int8))
            # int8 times float32 in one operation is half as fast on a CPU.
            return _at(levels, positions).float().mul_(_at(scales, positions).float())
        return _at(self._by_token(rows.contiguous().view(_DTYPES[self.scalar])), positions).float()

    def _ordered(self, values: Tensor) -> Tensor:
        """[N, tokens, width] to [N, tokens * width] in the order of a stored row."""
        return (values.transpose(1, 2) if self.by_channel else values).flatten(1)

    def _by_token(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`_ordered` from flat rows, a view."""
        if self.by_channel:
            return values.unflatten(1, (self.width, self.num_tokens)).transpose(1, 2)
        return values.unflatten(1, (self.num_tokens, self.width))

    def project(self, features: Tensor) -> Tensor:
        """What is stored of features [N, *shape], before the number format: [tokens, width] float32."""
        values = features.float().flatten(0, -2)
        if self.mean is not None and self.scale is not None:
            values = (values - self.mean) / self.scale
        return values if self.components is None else values @ self.components.T


def quantised(values: Tensor, step: float, channels: int) -> tuple[Tensor, Tensor]:
    """float16 scales [...] and int8 levels [..., width] of vectors; see `Projection.step`, relative to `channels` values."""
    scales = values.abs().amax(dim=-1) / 127
    if step:
        scales = torch.maximum(scales, values.norm(dim=-1) * (step / math.sqrt(channels)))
    scales = _half_rounded_up(scales)
    levels = values / scales.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return scales, levels.round().to(torch.int8)


def _at(values: Tensor, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(1, positions)


def _half_rounded_up(values: Tensor) -> Tensor:
    """The smallest float16 not below each value >= 0, so that no quotient by it leaves the int8 range."""
    nearest = values.half()
    following = (nearest.view(torch.int16) + 1).view(torch.float16)  # nextafter has no float16 on CUDA
    return torch.where(nearest.float() < values, following, nearest)
