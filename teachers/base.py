"""The teacher interface: a frozen image encoder that turns pixels into a summary vector and a grid of patch features.

A :class:`TeacherSpec` describes a teacher before its weights are downloaded. To add one, subclass :class:`Teacher` and
register a factory in `teachers/registry.py`, or name it in the configuration as ``package.module:factory``;
`teachers/hog.py` is a complete example.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from teachers.errors import TeacherError as TeacherError
from teachers.errors import WeightsNotFoundError as WeightsNotFoundError
from teachers.padding import average_unpadded

if TYPE_CHECKING:  # it imports this module
    from teachers.hub import HubFile

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["squash", "pad"]


class TeacherOutput(NamedTuple):
    """A teacher's features of B images: summary [B, D_s], or None (SAM), and patches [B, h, w, D]."""

    summary: Tensor | None
    patches: Tensor

    def to(self, device: str) -> TeacherOutput:
        """A copy on a device."""
        return TeacherOutput(None if self.summary is None else self.summary.to(device), self.patches.to(device))


@dataclass(frozen=True)
class TeacherOptions:
    """What a user may set for any teacher; a factory raises :class:`TeacherError` for what it does not support.

    Attributes:
        variant: the part of the teacher's name after the slash (``vitb14`` in ``dinov2/vitb14``), or "".
        weights: ``pretrained``, ``random``, ``random:<seed>``, or the path of a checkpoint file.
        input_size: side of the square input in pixels, or None for the published one.
        pool: side of the square of patches that is averaged into one, or None for the teacher's default.
        args: arguments of the underlying library's model constructor.
    """

    variant: str = ""
    weights: str = "pretrained"
    input_size: int | None = None
    pool: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherSpec:
    """Everything that determines a teacher's numbers, known before its weights are loaded.

    Attributes:
        name: as in the configuration (``dinov2/vitb14``).
        architecture: library and model (``timm/vit_base_patch14_dinov2``).
        weights: ``hub:<tag>``, ``file:<sha256 of the file>``, ``random:<seed>`` or ``none`` (weight-free).
        input_size: (H, W) in pixels.
        mean, std: per-channel normalisation of RGB in [0, 1].
        interpolation: ``bicubic`` or ``bilinear``, for resizing the original pixels to `input_size`, once.
        summary_dim: channels of the summary, or None.
        patch_dim: channels of a patch.
        grid: (h, w) patches, after pooling.
        pool: side of the square of patches averaged into one; divides the encoder's own grid exactly.
        model_args: arguments passed to the library's constructor.
        licence: SPDX identifier or name of the weights' licence, as published.
        computation: how the features are computed where the fields above do not tell it, such as a correction of what the
            library does; "" for the library's own way.
        resize_mode: ``squash``: images are resized to `input_size` whatever the ratio of their sides. ``pad``: the ratio is kept,
            and zeros are added right and below after normalisation; `grid` then covers the image alone.
    """

    name: str
    architecture: str
    weights: str
    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    summary_dim: int | None
    patch_dim: int
    grid: tuple[int, int]
    pool: int = 1
    model_args: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    computation: str = ""
    resize_mode: ResizeMode = "squash"

    @property
    def channels(self) -> int:
        """Channels of the pixels to encode: RGB, and with ``pad`` a mask."""
        return 4 if self.resize_mode == "pad" else 3

    def identity(self) -> dict[str, Any]:
        """All fields but name and licence, JSON-ready: teachers of equal identity share a cache."""
        fields = asdict(self)
        del fields["name"], fields["licence"]
        for added, default in (("computation", ""), ("resize_mode", "squash")):  # caches of earlier versions lack them
            if fields[added] == default:
                del fields[added]
        return fields


class Teacher(ABC):
    """A frozen encoder. Cheap to construct; `load` loads the weights.

    Attributes:
        spec: description of inputs, outputs and weights.
        weights_sha256: digest of the loaded parameters and buffers, "" before `load` and for weight-free teachers.
        hub_file: where its weights are published; None if they are not, or the teacher does not tell.
    """

    spec: TeacherSpec
    weights_sha256: str = ""
    hub_file: HubFile | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights onto `device`, to compute in `dtype`.

        Raises:
            WeightsNotFoundError, TeacherError: if the file is missing, or does not fit the architecture.
        """

    def check(self) -> None:  # noqa: B027
        """Find out for a plan, without loading, whether `load` can succeed; by default nothing is checked.

        Raises:
            WeightsNotFoundError, TeacherError: if the weights cannot be had, or are those of another network.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> TeacherOutput:
        """Encode images [B, 3, H, W], normalised with the spec's mean and std, in the dtype and on the device of `load`.

        With the resize mode ``pad``, returns the patches of the padded images, not pooled; :meth:`encode` averages the image's.
        """

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> TeacherOutput:
        """Normalise on the device and encode.

        Args:
            pixels: [B, 3, H, W] uint8 RGB at the spec's input size, on any device. With the resize mode ``pad``,
                [B, 4, H, W]: the fourth channel is 0 on padding, which lies right and below, and 1 elsewhere.

        Returns:
            float32 features on the device of `load`: summary [B, D_s] or None, patches [B, h, w, D].

        Raises:
            TeacherError: if the pixels or the features do not have the shapes of the spec.
        """
        spec, batch = self.spec, len(pixels)
        if pixels.shape[1] != spec.channels:
            raise TeacherError(f"teacher {spec.name}: encodes {spec.channels} channels, not {pixels.shape[1]}")
        pixels = pixels.to(self.device, non_blocking=True)
        mean, std = (_by_channel(tuple(values), self.device) for values in (spec.mean, spec.std))
        images = pixels[:, :3].float().div_(255).sub_(mean).div_(std)
        if spec.resize_mode == "pad":
            images.mul_(mask := pixels[:, 3:] > 0)
        summary, patches = self.forward(images.to(self.dtype))
        if spec.resize_mode == "pad":
            patches = average_unpadded(patches.float(), mask[:, 0], spec.grid)
        promised = (batch, spec.summary_dim) if spec.summary_dim else None, (batch, *spec.grid, spec.patch_dim)
        given = None if summary is None else tuple(summary.shape), tuple(patches.shape)
        if promised != given:
            raise TeacherError(
                f"teacher {spec.name}: returned summary and patches of shape {given}, its spec says {promised}"
            )
        return TeacherOutput(None if summary is None else summary.float(), patches.float())


@lru_cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, 3, 1, 1] float32, created once: each copy to a GPU waits for all of its pending work."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def pool_grid(patches: Tensor, pool: int) -> Tensor:
    """Average squares of `pool` x `pool` patches: [B, h, w, D], h and w divisible by `pool` -> [B, h / pool, w / pool, D]."""
    if pool == 1:
        return patches
    batch, height, width, channels = patches.shape
    return patches.view(batch, height // pool, pool, width // pool, pool, channels).mean(dim=(2, 4))


def digest_state(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's state dict, independent of its file."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
