"""Storage formats of features: encoded on the writer's device, decoded on the training device in one call per batch.

A codec is named ``[pca[<k>]-]<scalar>[-zstd]``:

``scalar``   ``float32``, ``float16``, ``bfloat16``, or ``int8`` with one float16 scale per token (its largest
             magnitude / 127, rounded up)
``pca<k>``   patches are first projected on their first k principal components; ``pca`` alone keeps as many as needed
             for a mean cosine of `TARGET_COSINE` per token, and projects only if that saves space
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
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.cache.layout.arrays import dump_arrays, load_arrays
from pipeline.errors import UserError

TARGET_COSINE = 0.99
"""Mean cosine between a token and its decoded value that ``pca`` keeps enough components for."""
MARGIN = 0.002
"""Loss of that cosine allowed for images outside the sample."""
WORTH = 0.9
"""``pca`` projects if projected rows take at most this share of the space of unprojected ones."""
COMPONENT_STEP = 8
"""``pca`` chooses a multiple of this number of components, so that rows stay aligned."""
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

    def build(self, shapes: Mapping[str, tuple[int, ...]], fitted: Projection | None) -> dict[str, FeatureCodec]:
        """The feature codec of every token type, given the shapes of one image's features; only patches are projected."""
        return {
            kind: FeatureCodec(self.scalar, shape, fitted if kind == "patches" else None, self.zstd)
            for kind, shape in shapes.items()
        }


@dataclass(frozen=True)
class Projection:
    """Principal components of patches: mean [D] and basis [k, D] of orthonormal rows by falling variance, float32."""

    mean: Tensor
    basis: Tensor


def dump_projection(projection: Projection | None) -> bytes:
    """A projection, or None as the decision against one, as the bytes of an .npz file."""
    return dump_arrays({"mean": projection.mean.numpy(), "basis": projection.basis.numpy()} if projection else {})


def load_projection(data: bytes) -> Projection | None:
    """The inverse of :func:`dump_projection`."""
    arrays = load_arrays(data)
    return Projection(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["basis"])) if arrays else None


class FeatureCodec(nn.Module):
    """Encodes and decodes one token type, of shape (D,) or (h, w, D), on any device.

    The values of a row are stored token by token or, if `by_channel`, channel by channel.
    """

    mean: Tensor | None
    basis: Tensor | None

    def __init__(
        self, scalar: str, shape: tuple[int, ...], projection: Projection | None = None, by_channel: bool = False
    ) -> None:
        super().__init__()
        self.scalar, self.shape, self.by_channel = scalar, tuple(shape), by_channel
        self.register_buffer("mean", projection.mean if projection else None, persistent=False)
        self.register_buffer("basis", projection.basis if projection else None, persistent=False)
        self.width = len(projection.basis) if projection else self.shape[-1]
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
        values = self._project(features).reshape(len(features), self.num_tokens, self.width)
        if self.scalar == "int8":
            scales = _half_rounded_up(values.abs().amax(dim=-1) / 127)
            levels = values / scales.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
            parts = [scales, self._ordered(levels.round().to(torch.int8))]
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
        if self.scalar == "int8":
            scales = rows[:, : 2 * self.num_tokens].contiguous().view(torch.float16).unsqueeze(-1)
            levels = self._by_token(rows[:, 2 * self.num_tokens :].view(torch.int8))
            # int8 times float32 in one operation is half as fast on a CPU.
            values = _at(levels, positions).float().mul_(_at(scales, positions).float())
        else:
            values = _at(self._by_token(rows.contiguous().view(_DTYPES[self.scalar])), positions).float()
        kept = values.shape[1]
        if self.basis is not None and self.mean is not None:
            values = torch.addmm(self.mean, values.flatten(0, 1), self.basis)
        return values.reshape(len(rows), *(self.shape if positions is None else (kept, self.shape[-1])))

    def _ordered(self, values: Tensor) -> Tensor:
        """[N, tokens, width] to [N, tokens * width] in the order of a stored row."""
        return (values.transpose(1, 2) if self.by_channel else values).flatten(1)

    def _by_token(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`_ordered` from flat rows, a view."""
        if self.by_channel:
            return values.unflatten(1, (self.width, self.num_tokens)).transpose(1, 2)
        return values.unflatten(1, (self.num_tokens, self.width))

    def fidelity(self, features: Tensor, rows: np.ndarray) -> dict[str, float]:
        """Fidelity of the encoded `rows` to `features` [N, *shape], see :func:`fidelity`."""
        return fidelity(features, self.decode(torch.from_numpy(rows).to(features.device)))

    def _project(self, features: Tensor) -> Tensor:
        if self.basis is None or self.mean is None:
            return features.float()
        return torch.addmm(-self.mean @ self.basis.T, features.float().flatten(0, -2), self.basis.T)


def fidelity(features: Tensor, kept: Tensor) -> dict[str, float]:
    """Similarity of decoded tokens to the original ones, both [..., D].

    ``cosine`` is the mean over the tokens that are not all zero, ``cosine_p1`` its 1st percentile, ``relative_error`` the
    norm of the difference relative to that of the features.
    """
    features, kept = features.float().flatten(0, -2), kept.flatten(0, -2)
    directed = features.norm(dim=-1) > 0  # the zero vector has no direction to keep
    cosine = nn.functional.cosine_similarity(features[directed], kept[directed], dim=-1).cpu().numpy()
    cosine = cosine if len(cosine) else np.ones(1)
    error = ((kept - features).norm() / features.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return {"cosine": float(cosine.mean()), "cosine_p1": float(np.percentile(cosine, 1)), "relative_error": error}


def fit_projection(codec: Codec, patches: Tensor) -> Projection | None:
    """Principal components of patches [N, h, w, D] float32 of a sample of images.

    If the codec leaves their number open, one half of the images is fitted, and the smallest number is chosen with which
    the other half has a mean cosine of `TARGET_COSINE` plus `MARGIN` after decoding. Returns None if that would not make
    the rows smaller: features after a ReLU are sparse, which zstd exploits better than a projection does.

    Raises:
        UserError: if the codec asks for more components than there are channels.
    """
    if codec.components is not None:
        if codec.components > patches.shape[-1]:
            raise UserError(f"codec pca{codec.components}: the patches have {patches.shape[-1]} channels, not more")
        return _principal(patches, codec.components)
    full = _principal(patches[::2], patches.shape[-1])
    held_out = patches[1::2] if len(patches) > 1 else patches
    few, enough = 0, -(-len(full.basis) // COMPONENT_STEP)
    while enough - few > 1:
        middle = (few + enough) // 2
        encoder, rows = _encoded(codec, held_out, _first(full, middle * COMPONENT_STEP))
        reached = encoder.fidelity(held_out, rows)["cosine"] >= TARGET_COSINE + MARGIN
        few, enough = (few, middle) if reached else (middle, enough)
    chosen = _first(full, enough * COMPONENT_STEP)
    projected, plain = (_stored_bytes(codec, _encoded(codec, held_out, basis)[1]) for basis in (chosen, None))
    return _principal(patches, len(chosen.basis)) if projected <= WORTH * plain else None


def _first(projection: Projection, components: int) -> Projection:
    return Projection(projection.mean, projection.basis[:components])


def _encoded(codec: Codec, patches: Tensor, projection: Projection | None) -> tuple[FeatureCodec, np.ndarray]:
    encoder = FeatureCodec(codec.scalar, tuple(patches.shape[1:]), projection, codec.zstd)
    return encoder, encoder.encode(patches)


def _stored_bytes(codec: Codec, rows: np.ndarray) -> int:
    return pa.compress(rows.tobytes(), "zstd").size if codec.zstd else rows.nbytes


def _principal(patches: Tensor, components: int) -> Projection:
    tokens = patches.flatten(0, -2).double().cpu()
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    # eigh lists the smallest eigenvalue first.
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :components]
    return Projection(mean.float(), vectors.T.float().contiguous())


def _at(values: Tensor, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(1, positions)


def _half_rounded_up(values: Tensor) -> Tensor:
    """The smallest float16 not below each value >= 0, so that no quotient by it leaves the int8 range."""
    nearest = values.half()
    following = (nearest.view(torch.int16) + 1).view(torch.float16)  # nextafter has no float16 on CUDA
    return torch.where(nearest.float() < values, following, nearest)
