"""Distillation losses: pure functions of tensors, in float32 whatever the autocast, and the registry that names them.

A new loss is one function and one line of `LOSSES` (of each vector alone, for either token type) or of `RELATIONS` (of a
summary among past ones). The configuration gives each a weight: ``loss.patches: {cosine: 0.9, smooth_l1: 0.1}``, the
default, is that of AM-RADIO (Ranzinger et al. 2024, section 3.3) with the cosine per token; ``{mse: 1}`` on targets
standardised by ``phi_s`` that of RADIOv2.5 (Heinrich et al. 2025).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distill.config import LossConfig
from pipeline.errors import UserError

VectorLoss = Callable[[Tensor, Tensor], Tensor]
"""(predicted [..., D], target [..., D]) -> [...] float32."""

RelationLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(predicted [B, D], target [B, D], past [Q, D], known [Q], temperature) -> [B] float32."""


def _in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(loss)
    def wrapped(predicted: Tensor, target: Tensor, *rest: Tensor | float) -> Tensor:
        with torch.autocast(predicted.device.type, enabled=False):
            return loss(predicted.float(), target.float(), *rest)

    return wrapped


class _OneLessCosine(Function):
    """1 - cosine of each vector, with a backward in two passes over the vectors.

    `F.cosine_similarity` is the same; forward and backward, it takes four times as many kernels, and keeps two copies of the
    vectors. On a GPU launching kernels is what a step of a small student waits for.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor) -> Tensor:
        norm, other = (torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-8) for vectors in (predicted, target))
        scale = norm * other
        cosines = (predicted * target).sum(dim=-1) / scale
        ctx.save_for_backward(predicted, target, norm, scale, cosines)
        return 1 - cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """To the predicted vector p, with target t: cosine p / |p|^2 - t / (|p| |t|)."""
        predicted, target, norm, scale, cosines = ctx.saved_tensors
        along, towards = gradient * cosines / norm.square(), gradient / scale
        return torch.addcmul(predicted * along.unsqueeze(-1), target, towards.unsqueeze(-1), value=-1), None


@_in_float32
def cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each vector: [..., D] -> [...]; no gradient goes to the target."""
    distances: Tensor = _OneLessCosine.apply(predicted, target)
    return distances


@_in_float32
def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 (Girshick 2015, equation 3; beta 1), mean over the channels of each vector: [..., D] -> [...]."""
    return F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)


@_in_float32
def mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the channels of each vector: [..., D] -> [...]."""
    return F.mse_loss(predicted, target, reduction="none").mean(dim=-1)


SAME = 0.9999
"""Cosine from which two of a teacher's summaries are of one view of an image, stored alike."""


class _Relation(Function):
    """:func:`relation`, with a backward in half of the kernels that autograd would launch."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, past: Tensor, known: Tensor, temperature: float) -> Tensor:
        vectors = torch.cat([predicted, target])
        norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min_(1e-12)
        units = vectors.div_(norms)
        cosines = (units @ past.T).unflatten(0, (2, len(target)))
        left_out = cosines[1].ge(SAME).logical_or_(~known)
        student, teacher = cosines.div_(temperature).masked_fill_(left_out, -1e4).log_softmax(dim=-1)
        likeness = teacher.exp()
        ctx.temperature = temperature
        ctx.save_for_backward(units[: len(target)], norms[: len(target)], past, likeness, student)
        return (likeness * (teacher - student)).sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """To the logits, the difference of both likenesses; to a vector, what is across its direction."""
        unit, norm, past, likeness, student = ctx.saved_tensors
        scale = gradient.unsqueeze(-1) / (norm * ctx.temperature)
        towards = (student.exp() - likeness) @ past * scale
        along = (towards * unit).sum(dim=-1, keepdim=True)
        return torch.addcmul(towards, along, unit, value=-1), None, None, None, None


@_in_float32
def relation(predicted: Tensor, target: Tensor, past: Tensor, known: Tensor, temperature: float) -> Tensor:
    """KL divergence from the student's likeness to past summaries to the teacher's, in nats.

    The likeness is the softmax over the queue of cosine / temperature, as in LightlyTrain's distillationv3. Unlike there, no
    image is compared with itself, which would take nearly all of the teacher's likeness: the queue holds summaries of past
    steps alone, and places where the teacher's cosine is `SAME` or more, as where it reaches back to the epoch before, are
    left out.

    Args:
        predicted, target: [B, D], by the student's head and by the teacher.
        past: [Q, D] unit vectors, the teacher's.
        known: [Q] bool, the places of `past` that are filled; where none is left, the loss is 0.
        temperature: of the softmax.

    Returns:
        [B] float32.
    """
    divergences: Tensor = _Relation.apply(predicted, target, past.float(), known, temperature)
    return divergences


LOSSES: dict[str, VectorLoss] = {"cosine": cosine, "smooth_l1": smooth_l1, "mse": mse}
"""Losses of each vector alone, for patches and summaries."""

RELATIONS: dict[str, RelationLoss] = {"relation": relation}
"""Losses of a summary among the teacher's past ones."""


def vector_loss(terms: Mapping[str, float], predicted: Tensor, target: Tensor) -> Tensor:
    """The weighted sum of the `LOSSES` among `terms`, averaged over the tokens of an image.

    Args:
        terms: weight by name.
        predicted, target: [B, D] or [B, h, w, D].

    Returns:
        [B] float32.
    """
    losses = [(LOSSES[name](predicted, target), weight) for name, weight in terms.items() if name in LOSSES]
    if not losses:
        return predicted.new_zeros(len(predicted), dtype=torch.float32)
    (loss, weight), *others = losses
    total = weight * loss
    for loss, weight in others:
        total = torch.add(total, loss, alpha=weight)
    return total.flatten(1).mean(dim=1) if total.ndim > 1 else total


def check_losses(config: LossConfig) -> None:
    """Refuse names that are not registered.

    Raises:
        UserError: naming the field, the name and what there is.
    """
    _check("loss.patches", config.patches, LOSSES)
    _check("loss.summary", config.summary, {**LOSSES, **RELATIONS})


def _check(field: str, terms: Mapping[str, float], known: Iterable[str]) -> None:
    names = list(known)
    for unknown in (name for name in terms if name not in names):
        near = difflib.get_close_matches(unknown, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{field}: there is no loss {unknown}; {hint}known are {', '.join(names)}")
