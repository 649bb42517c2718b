"""Weights of teachers from a hub, a file or a seed. Only tensors and plain values are unpickled."""

import hashlib
import logging
import re
import socket
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from teachers.base import TeacherError, WeightsNotFoundError
from teachers.errors import one_line

log = logging.getLogger(__name__)

_RUN_ON_LOADING = re.compile(rb"__setstate__|__torch__\.torch\.classes")
"""Code that TorchScript runs on loading: classes with `__setstate__`, and classes written in C++."""

T = TypeVar("T")


@dataclass(frozen=True)
class WeightSource:
    """The parsed `weights` field.

    Attributes:
        kind: ``hub``, ``file`` or ``random``.
        value: the hub's tag, the path, or the seed.
        identity: as in :attr:`~teachers.base.TeacherSpec.weights`.
    """

    kind: str
    value: str
    identity: str


def parse_weights(weights: str, teacher: str, tag: str) -> WeightSource:
    """Read the `weights` field; `tag` is that of the teacher's published weights.

    Raises:
        TeacherError, WeightsNotFoundError: for a seed that is not a number, and a path without a file.
    """
    if weights == "pretrained":
        return WeightSource("hub", tag, f"hub:{tag}")
    if weights == "random" or weights.startswith("random:"):
        seed = weights.partition(":")[2] or "0"
        if not seed.isdecimal():
            raise TeacherError(f"teacher {teacher}: weights: the seed of random:{seed} must be a whole number")
        return WeightSource("random", seed, f"random:{seed}")
    path = Path(weights).expanduser().resolve()
    if not path.is_file():
        raise WeightsNotFoundError(
            f"teacher {teacher}: weights: there is no file {path}; put the checkpoint there, or set weights to its path, "
            "to `pretrained`, or to `random` for an untrained network"
        )
    return WeightSource("file", str(path), f"file:{_file_sha256(path, path.stat().st_mtime_ns)}")


@cache
def _file_sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def seeded_init(seed: int, teacher: str) -> Iterator[None]:
    """Initialise under a seed without changing the global random state, and log a warning."""
    log.warning("teacher %s: untrained, its weights are random (seed %d); its features are meaningless", teacher, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def load_from_hub(teacher: str, fetch: Callable[[], T]) -> T:
    """Call `fetch`, which finds weights in the hub's cache or downloads them; WeightsNotFoundError if it fails."""
    try:
        with _offline_if_unreachable():
            return fetch()
    except TeacherError:
        raise
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise WeightsNotFoundError(
            f"teacher {teacher}: its pretrained weights are neither in the local hub cache ({constants.HF_HUB_CACHE}) nor "
            f"can they be downloaded ({reason}); put the file on this machine and set teachers.<i>.weights=<path of the file>, "
            "or weights=random for an untrained network"
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Use only the local cache if the hub does not answer: its client would retry for most of a minute."""
    hub = urlsplit(constants.ENDPOINT)
    address = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    before = constants.HF_HUB_OFFLINE
    if not urllib.request.getproxies():
        try:
            socket.create_connection(address, timeout=3).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_checkpoint(path: str | Path, teacher: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name: safetensors, a PyTorch file of tensors, or a TorchScript archive.

    Wrappers (``model``, ``state_dict``, ``teacher``) and the ``module.`` prefix of DDP are removed.

    Raises:
        TeacherError: if the file is none of these.
    """
    path = Path(path)
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:
        raise TeacherError(
            f"teacher {teacher}: weights: {path} is not a readable checkpoint ({one_line(error)}); it must be "
            "safetensors, a PyTorch file with tensors only, or a TorchScript archive"
        ) from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        found = type(loaded).__name__
        raise TeacherError(f"teacher {teacher}: weights: {path} contains a {found}, not tensors by name")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _load_torch(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:
        # OpenAI publishes CLIP as TorchScript; loading it builds a graph without running it.
        return torch.jit.load(path, map_location="cpu").state_dict()


def _check_archive(path: Path) -> None:
    """Raise a ValueError for a zip bomb, or code that loading would run; PyTorch's older formats are not archives."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > path.stat().st_size:  # PyTorch stores tensors as they are
            raise ValueError(f"its members unpack to {size} bytes, more than the file has")
        for member in members:
            if member.filename.endswith((".py", ".pkl")) and _RUN_ON_LOADING.search(archive.read(member)):
                raise ValueError(f"{member.filename} contains code that runs on loading")


@contextmanager
def conversion_errors(path: str | Path, teacher: str) -> Iterator[None]:
    """Report failed conversions of a file's keys and position tables as a :class:`TeacherError`."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise TeacherError(f"teacher {teacher}: weights: {path} does not fit this architecture ({reason})") from error


def check_keys(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], teacher: str, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The expected tensors, none missing or surplus, all of the expected shape, and floating-point where expected.

    Args:
        expected: the model's own state dict.
        ignored: prefixes of keys of other parts of the published file.

    Raises:
        TeacherError: naming the first keys.
    """
    where = f"teacher {teacher}: weights"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise TeacherError(f"{where}: the file lacks {_some(missing)}: does it have this architecture?")
    surplus = sorted(key for key in tensors.keys() - expected.keys() if not key.startswith(tuple(ignored)))
    if surplus:
        raise TeacherError(f"{where}: the file has {_some(surplus)}, which this architecture does not have")
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(tensor.shape)} in the architecture"
            raise TeacherError(f"{where}: {key} has shape {shapes}: is it another size?")
        if tensors[key].is_floating_point() != tensor.is_floating_point():
            types = f"{tensors[key].dtype} in the file, {tensor.dtype} in the architecture"
            raise TeacherError(f"{where}: {key} is {types}: is it quantised?")
    return {key: tensors[key] for key in expected}


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:5])}{f' and {len(keys) - 5} more keys' if len(keys) > 5 else ''}"
