"""PHI-S (Ranzinger et al. 2024, arXiv 2410.01680): a rotation and one scale that give every channel unit variance.

Unlike a division by each channel's own standard deviation, it keeps the shape of the distribution: y = R (x - mean) /
scale with R orthogonal. R rotates the features to their principal axes, then spreads the variance evenly over all
channels with a Hadamard matrix, whose entries all have the same magnitude. Sizes without one use plane rotations [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.cache.layout.arrays import dump_arrays, kinds_of, load_arrays
from pipeline.cache.layout.stats import Moments


@dataclass(frozen=True)
class PhiS:
    """Standardisation of vectors x [..., D] as ``(x - mean) @ rotation.T / scale``: float64 [D], [D, D] and scalar.

    The scale is the square root of the mean variance over the channels.
    """

    mean: np.ndarray
    rotation: np.ndarray
    scale: float

    @classmethod
    def of(cls, moments: Moments) -> PhiS:
        """From the covariance of the features."""
        variances, axes = np.linalg.eigh(moments.covariance)
        variances = variances.clip(min=0)
        size = len(variances)
        spread = hadamard(size)
        rotation = (spread / np.sqrt(size) if spread is not None else _equalising_rotation(variances)) @ axes.T
        return cls(moments.mean, rotation, float(np.sqrt(variances.mean())))


def dump_phi_s(parts: dict[str, PhiS]) -> bytes:
    """PHI-S by token type as the bytes of an .npz file; its rotation is kept in float32."""
    arrays: dict[str, object] = {}
    for kind, part in parts.items():
        rotation = part.rotation.astype(np.float32)
        arrays |= {f"{kind}_mean": part.mean, f"{kind}_rotation": rotation, f"{kind}_scale": part.scale}
    return dump_arrays(arrays)


def load_phi_s(data: bytes) -> dict[str, PhiS]:
    """The inverse of :func:`dump_phi_s`."""
    arrays = load_arrays(data)
    return {
        kind: PhiS(arrays[f"{kind}_mean"], arrays[f"{kind}_rotation"], float(arrays[f"{kind}_scale"]))
        for kind in kinds_of(arrays)
    }


def hadamard(size: int) -> np.ndarray | None:
    """A Hadamard matrix (entries ±1, orthogonal rows) of this size, or None if the constructions used here give none.

    Sylvester's doubling of 1, 2, or a matrix of Paley's first kind (Paley 1933): of size q + 1, q a prime of form 4n + 3.
    They cover 192, 256, 320, 384, 512, 768, 1024, 1280, 1408 and 1536.
    """
    if size <= 2:
        return np.array([[1, 1], [1, -1]])[:size, :size]
    if _is_prime(size - 1) and size % 4 == 0:
        return _paley(size - 1)
    half = hadamard(size // 2) if size % 2 == 0 else None
    return None if half is None else np.kron(half, np.array([[1, 1], [1, -1]]))


def _paley(prime: int) -> np.ndarray:
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)])
    jacobsthal = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    skew = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [-np.ones((prime, 1)), jacobsthal]])
    return (skew + np.eye(prime + 1)).astype(int)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _equalising_rotation(variances: np.ndarray) -> np.ndarray:
    """An orthogonal Q with every diagonal entry of Q diag(variances) Q^T equal to their mean."""
    size, level = len(variances), variances.mean()
    matrix, rotation = np.diag(variances), np.eye(size)
    for _ in range(size - 1):
        low, high = np.argmin(np.diagonal(matrix)), np.argmax(np.diagonal(matrix))
        below, above, shared = matrix[low, low] - level, matrix[high, high] - level, matrix[low, high]
        if above <= 1e-12 * level or below == 0:
            break
        # The root of above t^2 + 2 shared t + below = 0 brings entry `low` to the level.
        tangent = (-shared + np.sqrt(shared**2 - above * below)) / above
        cosine = 1 / np.hypot(1, tangent)
        plane = cosine * np.array([[1, tangent], [-tangent, 1]])
        pair = [low, high]
        matrix[pair] = plane @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ plane.T
        rotation[pair] = plane @ rotation[pair]
    return rotation
