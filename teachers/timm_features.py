"""The summary and the patches of any timm model, whatever its `forward_features` returns."""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

Read = Callable[[Any, Tensor], tuple[Tensor | None, Tensor]]
"""(model, images [B, 3, H, W]) -> summary [B, D_s], or None for a model without a head, and patches [B, h, w, D]."""


def find_features(model: Any, images: Tensor) -> Read:
    """How to read the features of a model, tried on images.

    `forward_features` gives a map, or tokens with as many patches as the model's last map has places; the patches of all
    other models (lists of tokens, a class token alone) are the last map of `forward_intermediates`, after the final norm
    where the model can apply it.

    Raises:
        ValueError: if the model has neither.
    """
    intermediates = _intermediates(model, images)
    last = intermediates and intermediates(model, images)[1]
    features = model.forward_features(images)
    if isinstance(features, Tensor) and features.ndim == 4 and (last is None or features.shape[-1] > 1):
        return _read_map
    if isinstance(features, Tensor) and features.ndim == 3 and _is_grid(model, features, last, images.shape[-1]):
        return _read_tokens
    if intermediates is None:
        raise ValueError("it gives no map of patches, but a class token or tokens of several sizes")
    return intermediates


def _intermediates(model: Any, images: Tensor) -> Read | None:
    """The last map of `forward_intermediates`; None if the model has none."""
    for norm in (True, False):
        read = partial(_read_intermediates, norm=norm)
        try:
            if read(model, images)[1].ndim == 4:
                return read
        except (AttributeError, TypeError, AssertionError, RuntimeError, ValueError):
            continue
    return None


def _is_grid(model: Any, features: Tensor, last: Tensor | None, size: int) -> bool:
    """Whether the tokens after the prefix are a square of patches: the last map's, or the patch embedding's."""
    patches = features.shape[1] - _prefix(model)
    if isqrt(patches) ** 2 != patches:
        return False
    if last is not None:
        return last.shape[1:] == (isqrt(patches), isqrt(patches), features.shape[-1])
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    return patch is not None and isqrt(patches) == size // patch


def _prefix(model: Any) -> int:
    return getattr(model, "num_prefix_tokens", None) or 0


def _summary(model: Any, features: Any) -> Tensor | None:
    try:
        summary: Tensor = model.forward_head(features, pre_logits=True)
    except (AttributeError, TypeError, NotImplementedError):  # an encoder of a language model
        return None
    return summary


def _read_map(model: Any, images: Tensor) -> tuple[Tensor | None, Tensor]:
    features = model.forward_features(images)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return _summary(model, features), features if channels_last else features.permute(0, 2, 3, 1)


def _read_tokens(model: Any, images: Tensor) -> tuple[Tensor | None, Tensor]:
    features = model.forward_features(images)
    tokens = features[:, _prefix(model) :]
    side = isqrt(tokens.shape[1])
    return _summary(model, features), tokens.reshape(len(tokens), side, side, -1)


def _read_intermediates(model: Any, images: Tensor, norm: bool) -> tuple[Tensor | None, Tensor]:
    features, maps = model.forward_intermediates(images, indices=1, norm=norm, output_fmt="NCHW")
    return _summary(model, features), maps[-1].permute(0, 2, 3, 1)
