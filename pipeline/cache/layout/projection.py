"""Projections of a codec: fitted on the features of a sample of images, chosen by the standardised target, and their file.

Features are standardised before they are projected, so that principal components and the precision of int8 serve what a
student is trained on (`pipeline/cache/layout/target.py`), not the channels that happen to be large. Components are
orthonormal there: the cosine of a vector and its decoded value is that of their coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.arrays import dump_arrays, eight_bits, kinds_of, load_arrays
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection, quantised
from pipeline.cache.layout.target import (
    TARGET_COSINE,
    TARGET_COSINE_P1,
    cosine_figures,
    fidelity,
    inverse_deviations,
    keeps_target,
)
from pipeline.errors import UserError

MARGIN, MARGIN_P1 = 0.002, 0.01
"""Loss of the mean cosine, and of its 1st percentile, allowed for images outside the sample."""
WORTH = 0.9
"""Components are used if rows take at most this share of the space that they take without."""
COMPONENT_STEP = 8
"""``pca`` chooses a multiple of this number of components, so that rows stay aligned."""
STEPS = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Values of `Projection.step` that are tried if zstd compresses."""
HELD_OUT = 2**14
"""About how many patches a choice is tried on."""
COMPRESSED = 64
"""Images whose rows are compressed to compare sizes: those of a row group."""


class _Choice(NamedTuple):
    size: int
    projection: Projection


def dump_projections(codec: Codec, projections: Mapping[str, Projection]) -> bytes:
    """Projections by token type as the bytes of an .npz file.

    Components are as coarse as the values that they belong to: for int8 in 8 bits, with a unit for each, an error of a hundredth
    of a vector, where rounding of the values costs a tenth; otherwise in float16, an error of 2**-11.
    """
    arrays: dict[str, object] = {}
    for kind, part in projections.items():
        arrays |= {f"{kind}_mean": part.mean.numpy(), f"{kind}_scale": part.scale.numpy(), f"{kind}_step": part.step}
        if part.components is not None:
            components = part.components.numpy()
            if codec.scalar == "int8":
                arrays[f"{kind}_components"], arrays[f"{kind}_unit"] = eight_bits(components)
            else:
                arrays[f"{kind}_components"] = components.astype(np.float16)
    return dump_arrays(arrays)


def load_projections(data: bytes) -> dict[str, Projection]:
    """The inverse of :func:`dump_projections`."""
    arrays = load_arrays(data)
    return {kind: _load(arrays, kind) for kind in kinds_of(arrays)}


def _load(arrays: Mapping[str, np.ndarray], kind: str) -> Projection:
    components, unit = arrays.get(f"{kind}_components"), arrays.get(f"{kind}_unit")
    if components is not None:
        components = components.astype(np.float32) * (1 if unit is None else unit[:, None])
    return Projection(
        torch.from_numpy(arrays[f"{kind}_mean"]),
        torch.from_numpy(arrays[f"{kind}_scale"]),
        None if components is None else torch.from_numpy(components),
        float(arrays[f"{kind}_step"]),
    )


def fit_projections(codec: Codec, features: Mapping[str, Tensor]) -> dict[str, Projection]:
    """Projections by token type from the features [N, *shape] of a sample of images; summaries are standardised alone.

    If the codec leaves the number of components open, patches of one half of the images are fitted, and the form is chosen that
    takes least space while those of the other half keep their standardised values: a mean cosine of `TARGET_COSINE` and a
    1st percentile of `TARGET_COSINE_P1`, plus margins. Beside components there is a division by every channel's deviation:
    features after a ReLU are sparse, which zstd exploits better than a projection does.

    Raises:
        UserError: if the codec asks for more components than there are channels, or no form keeps enough.
    """
    return {
        kind: _fit_patches(codec, values) if kind == "patches" else _axes(values) for kind, values in features.items()
    }


def _fit_patches(codec: Codec, patches: Tensor) -> Projection:
    if codec.components is not None:
        if codec.components > patches.shape[-1]:
            raise UserError(f"codec pca{codec.components}: the patches have {patches.shape[-1]} channels, not more")
        return _principal(patches, codec.components)
    held_out = patches[1::2] if len(patches) > 1 else patches
    count = max(1, HELD_OUT // held_out[0, ..., 0].numel())
    held_out = held_out[:: max(1, len(held_out) // count)]
    steps = STEPS if codec.zstd and codec.scalar == "int8" else STEPS[:1]
    fitted = _principal(patches[::2], patches.shape[-1])
    projected = _smallest(_projected(codec, fitted, step, held_out) for step in steps)
    scaled = _smallest(_scaled(codec, fitted, step, held_out) for step in steps)
    if scaled is not None and (projected is None or projected.size > WORTH * scaled.size):
        return replace(_axes(patches), mean=torch.zeros_like(fitted.mean), step=scaled.projection.step)
    if projected is None:
        raise UserError(
            f"{codec.scalar} cannot keep a mean cosine of {TARGET_COSINE} and a 1st percentile of {TARGET_COSINE_P1} of "
            "the standardised patches; set cache.codec=float16"
        )
    components = projected.projection.components
    assert components is not None
    return replace(_principal(patches, len(components)), step=projected.projection.step)


def _smallest(choices: Iterable[_Choice | None]) -> _Choice | None:
    return min((choice for choice in choices if choice), key=lambda choice: choice.size, default=None)


def _projected(codec: Codec, fitted: Projection, step: float, held_out: Tensor) -> _Choice | None:
    """The fewest of the fitted components with which the held-out patches keep the target; None if all are too few."""
    full = FeatureCodec(codec.scalar, tuple(held_out.shape[1:]), fitted)
    coefficients = full.project(held_out)
    lengths = coefficients.norm(dim=-1)

    def keeps(components: int) -> bool:
        kept = _rounded(codec, coefficients[:, :components], step, len(fitted.mean))
        products = (kept * coefficients[:, :components]).sum(dim=-1)
        cosines = products / (lengths * kept.norm(dim=-1)).clamp_min(torch.finfo(torch.float32).tiny)
        return keeps_target(cosine_figures(cosines[lengths > 0]), MARGIN, MARGIN_P1)

    few, enough = 0, -(-len(fitted.mean) // COMPONENT_STEP)
    if not keeps(enough * COMPONENT_STEP):
        return None
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if keeps(middle * COMPONENT_STEP) else (middle, enough)
    assert fitted.components is not None
    chosen = replace(fitted, components=fitted.components[: enough * COMPONENT_STEP], step=step)
    return _Choice(_stored_bytes(codec, chosen, held_out), chosen)


def _scaled(codec: Codec, fitted: Projection, step: float, held_out: Tensor) -> _Choice | None:
    """Patches divided by their deviations, so that zeros stay zeros; None if that does not keep the target."""
    chosen = Projection(torch.zeros_like(fitted.mean), fitted.scale, step=step)
    values = held_out.float() / fitted.scale
    kept = _rounded(codec, values, step, len(fitted.mean)) * fitted.scale
    figures = fidelity(held_out, kept, fitted.mean, fitted.scale)
    return _Choice(_stored_bytes(codec, chosen, held_out), chosen) if keeps_target(figures, MARGIN, MARGIN_P1) else None


def _rounded(codec: Codec, values: Tensor, step: float, channels: int) -> Tensor:
    """Values [..., width] as they are after the number format."""
    if codec.scalar != "int8":
        return values.to(getattr(torch, codec.scalar)).float()
    scales, levels = quantised(values, step, channels)
    return levels * scales.float().unsqueeze(-1)


def _stored_bytes(codec: Codec, projection: Projection, patches: Tensor) -> int:
    shape = tuple(patches.shape[1:])
    rows = FeatureCodec(codec.scalar, shape, projection, codec.zstd).encode(patches[:COMPRESSED])
    return int(pa.compress(rows.tobytes(), "zstd").size) if codec.zstd else rows.nbytes


def _principal(patches: Tensor, components: int) -> Projection:
    """Standardisation and principal components of patches [N, h, w, D]."""
    axes = _axes(patches)
    tokens = ((patches.flatten(0, -2).float() - axes.mean) / axes.scale).double().cpu()
    # eigh lists the smallest eigenvalue first.
    vectors = torch.linalg.eigh(tokens.T @ tokens).eigenvectors.flip(1)[:, :components]
    return replace(axes, components=vectors.T.float().contiguous())


def _axes(features: Tensor) -> Projection:
    """Standardisation of features [N, ..., D]; a channel that is constant in the sample gets the median deviation."""
    tokens = features.flatten(0, -2).double().cpu()
    std, mean = torch.std_mean(tokens, dim=0, correction=0)
    alive = std[inverse_deviations(mean, std) > 0]
    typical = alive.median() if len(alive) else torch.ones((), dtype=torch.float64)
    scale = torch.where(inverse_deviations(mean, std) > 0, std, typical)
    return Projection(mean.float(), scale.float())
