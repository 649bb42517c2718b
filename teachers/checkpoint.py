"""Checkpoint files as tensors by name. Only tensors and plain values are unpickled."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from teachers.base import TeacherError
from teachers.errors import one_line

WRAPPERS = ("model", "state_dict", "teacher")
"""Keys under which training scripts keep the network."""
BACKBONE = "backbone."
TRAINING_HEADS = ("dino_head.", "ibot_head.", "head.")
"""Prefixes of the networks that DINO and DINOv2 train beside the backbone, and drop after training."""

DEFLATED_RATIO = 50
DEFLATED_BYTES = 64 << 20
"""Most that a deflated member, and all of them together, may unpack to. PyTorch stores tensors as they are; TorchScript
deflates its code, about fivefold (0.2 MB for a ViT-B/32)."""

_RUN_ON_LOADING = re.compile(rb"__setstate__|__torch__\.torch\.classes")
"""Code that TorchScript runs on loading: classes with `__setstate__`, and classes written in C++."""


def read_checkpoint(path: str | Path, teacher: str, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name: safetensors, a PyTorch file of tensors, or a TorchScript archive.

    Wrappers (``model``, ``state_dict``, ``teacher``), the ``module.`` prefix of DDP, and the ``backbone.`` prefix and
    projection heads of DINO's and DINOv2's training are removed.

    Args:
        device: ``cpu``, or ``meta`` for names, shapes and dtypes alone, which reads none of a PyTorch file's numbers.

    Raises:
        TeacherError: if the file is none of these.
    """
    path = Path(path)
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else _load_torch(path, device)
    except Exception as error:
        raise TeacherError(
            f"teacher {teacher}: weights: {path} is not a readable checkpoint ({one_line(error)}); it must be "
            "safetensors, a PyTorch file with tensors only, or a TorchScript archive"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        found = type(loaded).__name__
        raise TeacherError(f"teacher {teacher}: weights: {path} contains a {found}, not tensors by name")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    return {key: value.to(device) for key, value in _of_backbone(_without_prefix(tensors, "module.")).items()}


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Without a prefix that every key has."""
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _of_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a network under training, with blocks by their number; other files as they are.

    DINOv2 groups blocks for FSDP (`train.block_chunks`): ``blocks.<group>.<number>``.
    """
    backbone = {key: value for key, value in tensors.items() if key.startswith(BACKBONE)}
    if not backbone or not all(key.startswith((BACKBONE, *TRAINING_HEADS)) for key in tensors):
        return tensors
    backbone = _without_prefix(backbone, BACKBONE)
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in backbone.items()}


def _load_torch(path: Path, device: str) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except RuntimeError:
        # OpenAI publishes CLIP as TorchScript; loading it builds a graph without running it.
        return torch.jit.load(path, map_location="cpu").state_dict()


def _check_archive(path: Path) -> None:
    """Raise a ValueError for a zip bomb, or code that loading would run; PyTorch's older formats are not archives."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_sizes(members, path.stat().st_size)
        for member in members:
            if member.filename.endswith((".py", ".pkl")) and _RUN_ON_LOADING.search(archive.read(member)):
                raise ValueError(f"{member.filename} contains code that runs on loading")


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raise a ValueError if members overlap, or unpack to more than PyTorch would write."""
    packed = sum(member.compress_size for member in members)
    if packed > size:
        raise ValueError(f"its members take {packed} bytes, more than the {size} of the file")
    unpacked = 0
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size:
            continue
        if member.compress_type != zipfile.ZIP_DEFLATED or member.file_size > DEFLATED_RATIO * member.compress_size:
            raise ValueError(
                f"its member {member.filename} unpacks from {member.compress_size} to {member.file_size} bytes; "
                f"PyTorch stores tensors as they are, and deflates code up to {DEFLATED_RATIO}-fold"
            )
        unpacked += member.file_size
    if unpacked > DEFLATED_BYTES:
        raise ValueError(
            f"its deflated members unpack to {unpacked} bytes; code has less than {DEFLATED_BYTES >> 20} MiB"
        )
