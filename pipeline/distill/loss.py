"""Distillation losses: pure functions of tensors, and the registry that names them.

A loss declares what it compares, which decides its arguments and its result:

    @compares("vectors")    (predicted [..., D], target [..., D]) -> [...]: each vector alone, for patches and summaries
    @compares("patches")    (predicted [B, N, D], target [B, N, D], temperature) -> [B]: an image's patches with each other
    @compares("queue")      (predicted [B, D], target [B, D], queue [Q, D], filled [Q], temperature) -> [B]: a summary
                            with past summaries

A new loss is one function here and one line in `LOSSES`, or a function of your own, named `package.module:function`.
Inputs are float32 whatever the autocast. The recipe weights losses: the default, ``loss.patches: {cosine: 0.9,
smooth_l1: 0.1}``, is that of AM-RADIO (Ranzinger et al. 2024, section 3.3) with the cosine per patch; ``{mse: 1}`` on
targets standardised by ``phi_s`` is that of RADIOv2.5 (Heinrich et al. 2025).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.distill.config import LossConfig
from pipeline.errors import UserError, did_you_mean
from teachers.plugin import import_plugin

Compares = Literal["vectors", "patches", "queue"]


@dataclass(frozen=True)
class Loss:
    """A loss function and what it compares; calling it disables autocast and converts both inputs to float32."""

    function: Callable[..., Tensor]
    compares: Compares

    def __call__(self, predicted: Tensor, target: Tensor, *rest: Tensor | float) -> Tensor:
        """As the function."""
        with torch.autocast(predicted.device.type, enabled=False):
            return self.function(predicted.float(), target.float(), *rest)


def compares(what: Compares) -> Callable[[Callable[..., Tensor]], Loss]:
    """Decorator that turns a function into a :class:`Loss`."""
    return partial(Loss, compares=what)


class CosineDistance(Function):
    """1 - cosine over the last dimension: predicted and target [..., D] -> [...]; no gradient for the target.

    The backward pass is written by hand, because this loss is most of a step's cost beyond the student. Forward and backward
    on patches [32, 64, 768] in float32 on one CPU thread take F.cosine_similarity 5.2 times, and products and norms by autograd
    1.6 times as long (PyTorch 2.14). `torch.compile` reaches 1.05 times, but needs time at every start and a compiler on every
    machine, so `train.compile` is off by default on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor) -> Tensor:
        """1 - p.t / (|p| |t|), with norms of at least 1e-8."""
        predicted_norm, target_norm = (
            torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-8) for vectors in (predicted, target)
        )
        norms = predicted_norm * target_norm
        cosines = (predicted * target).sum(dim=-1) / norms
        ctx.save_for_backward(predicted, target, predicted_norm, norms, cosines)
        return 1 - cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """With respect to p: cosine p / |p|^2 - t / (|p| |t|)."""
        predicted, target, predicted_norm, norms, cosines = ctx.saved_tensors
        radial = (gradient * cosines / predicted_norm.square()).unsqueeze(-1)
        return torch.addcmul(predicted * radial, target, (gradient / norms).unsqueeze(-1), value=-1), None


@compares("vectors")
def cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each vector: [..., D] -> [...]; the target gets no gradient."""
    distances: Tensor = CosineDistance.apply(predicted, target)
    return distances


@compares("vectors")
def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 (Girshick 2015, equation 3; beta 1), mean over the channels of each vector: [..., D] -> [...]."""
    return F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)


@compares("vectors")
def mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the channels of each vector: [..., D] -> [...]."""
    return F.mse_loss(predicted, target, reduction="none").mean(dim=-1)


@compares("patches")
def patch_relation(predicted: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL divergence between the similarities of an image's patches to each other, the teacher's from the student's, in nats.

    With s_ij = cos(p_i, p_j) of the predicted patches and t_ij = cos(t_i, t_j) of the targets:

        1/N sum_i KL(softmax_j(t_ij / temperature) || softmax_j(s_ij / temperature))

    This is the local loss of LightlyTrain's distillationv3, here on standardised features and on the patches of the step
    (`loss.max_patches`). Each patch is also compared with itself. [B, N, D], patches at the same places -> [B] float32.
    """
    student, teacher = (
        (units @ units.transpose(1, 2) / temperature).log_softmax(dim=-1)
        for units in (F.normalize(predicted, dim=-1), F.normalize(target, dim=-1))
    )
    return _divergence(teacher, student).mean(dim=-1)


SAME_IMAGE = 0.9999
"""Cosine of two teacher summaries above which they are taken to be of the same view of the same image."""


@compares("queue")
def relation(predicted: Tensor, target: Tensor, queue: Tensor, filled: Tensor, temperature: float) -> Tensor:
    """KL divergence between the similarities of a summary to past summaries, the teacher's from the student's, in nats.

    The similarities are softmax(cosine / temperature) over the queue, as in LightlyTrain's distillationv3. There the queue
    contains the image itself, which takes nearly all of the teacher's probability. Here it contains past steps only, and
    the same image of the previous epoch (a cosine of `SAME_IMAGE` or more) is skipped.

    Args:
        predicted, target: [B, D], by the student's head and by the teacher.
        queue: [Q, D] unit vectors, the teacher's.
        filled: [Q] bool, the entries of `queue` that are in use; without any the loss is 0.

    Returns:
        [B] float32.
    """
    student, teacher = (F.normalize(summaries, dim=-1) @ queue.float().T for summaries in (predicted, target))
    skipped = teacher.ge(SAME_IMAGE).logical_or_(~filled)
    student, teacher = (
        (cosines / temperature).masked_fill(skipped, -1e4).log_softmax(dim=-1) for cosines in (student, teacher)
    )
    return _divergence(teacher, student)


def _divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)


LOSSES: dict[str, Loss] = {
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "mse": mse,
    "patch_relation": patch_relation,
    "relation": relation,
}


def find_loss(name: str) -> Loss:
    """The loss of a name in `LOSSES`, or of a `package.module:function`.

    Raises:
        ImportError, KeyError: if the module has no such loss; if no loss is registered under the name.
    """
    if ":" not in name:
        return LOSSES[name]
    loss = import_plugin(name)
    if not isinstance(loss, Loss):
        raise ImportError(f"{name} is not decorated with pipeline.distill.loss.compares")
    return loss


def image_loss(weights: Mapping[str, float], predicted: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The weighted sum of losses of an image, averaged over its patches; losses that need a queue are skipped.

    Summaries [B, D], or patches [B, N, D] or [B, h, w, D] -> [B] float32.
    """
    total: Tensor | None = None
    for name, weight in weights.items():
        loss = find_loss(name)
        if loss.compares == "vectors":
            term = loss(predicted, target)
            term = term.flatten(1).mean(dim=1) if term.ndim > 1 else term
        elif loss.compares == "patches":
            term = loss(predicted.flatten(1, -2), target.flatten(1, -2), temperature)
        else:
            continue
        total = weight * term if total is None else torch.add(total, term, alpha=weight)
    return predicted.new_zeros(len(predicted), dtype=torch.float32) if total is None else total


def check_losses(config: LossConfig) -> None:
    """Raise a UserError for losses that do not exist or do not fit, naming the field, the loss and the alternatives."""
    _check("loss.patches", config.patches, ("vectors", "patches"))
    _check("loss.summary", config.summary, ("vectors", "queue"))


def _check(field: str, weights: Mapping[str, float], allowed: tuple[Compares, ...]) -> None:
    names = [name for name, loss in LOSSES.items() if loss.compares in allowed]
    known = f"known are {', '.join(names)}"
    for name in weights:
        try:
            loss = find_loss(name)
        except KeyError:
            hint = did_you_mean(name, names, "did you mean {}? ")
            raise UserError(f"{field}: there is no loss {name}; {hint}{known}, and package.module:function") from None
        except ImportError as error:
            raise UserError(f"{field}: {error}") from error
        if loss.compares not in allowed:
            raise UserError(f"{field}: {name} compares {_COMPARED[loss.compares]}; {known}")


_COMPARED = {
    "vectors": "each vector alone",
    "patches": "the patches of an image with each other",
    "queue": "a summary with past ones",
}
