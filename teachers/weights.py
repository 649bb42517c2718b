"""Where the weights of a teacher come from: a hub, a file or a seed."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from teachers.base import TeacherError, WeightsNotFoundError

log = logging.getLogger(__name__)


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
