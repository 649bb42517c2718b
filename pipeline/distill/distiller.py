"""The module that is trained: student, heads, and each teacher's frozen standardisation and grid rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.distill.balance import FEATURE_KINDS, drop_coefficients, teacher_weights
from pipeline.distill.config import LossConfig
from pipeline.distill.grid import GridRule, patch_subsets
from pipeline.distill.loss import RELATIONS, vector_loss
from pipeline.distill.standardise import Standardiser
from pipeline.distill.summary_queue import SummaryQueue
from pipeline.errors import UserError, one_line
from pipeline.student.heads import distillation_head
from pipeline.student.model import Student, StudentOutput


class TeacherTarget(nn.Module):
    """One teacher's side of the loss: heads onto its features, its frozen statistics, its grid rule, its past."""

    patch_subsets: Tensor

    def __init__(
        self,
        teacher: CachedTeacher,
        standardisers: Mapping[str, Standardiser],
        codecs: Mapping[str, FeatureCodec],
        student: Student,
        grid: tuple[int, int],
        hidden: int,
        loss: LossConfig,
    ) -> None:
        super().__init__()
        self.teacher, self.loss = teacher, loss
        self.rule = GridRule(grid, teacher.spec.grid)
        self.register_buffer("patch_subsets", patch_subsets(self.rule.grid, loss.max_patches), persistent=False)
        self.standardisers = nn.ModuleDict({kind: standardisers[kind] for kind in teacher.shapes})
        folded = {kind: standardisers[kind].fold(codecs[kind]) for kind in teacher.shapes}
        self.codecs = nn.ModuleDict({kind: decoder or codecs[kind] for kind, decoder in folded.items()})
        self.folded = {kind for kind, decoder in folded.items() if decoder}
        dims = {"summary": student.encoder.dim, "patches": student.token_dim}
        self.heads = nn.ModuleDict(
            {kind: distillation_head(dims[kind], hidden, shape[-1]) for kind, shape in teacher.shapes.items()}
        )
        self.relations = {name: weight for name, weight in loss.summary.items() if name in RELATIONS}
        remembers = self.relations and teacher.summary_shape
        self.queue = SummaryQueue(loss.queue, *teacher.summary_shape) if remembers and teacher.summary_shape else None

    def predict(self, output: StudentOutput, places: Tensor | None = None) -> dict[str, Tensor]:
        """What the heads make of the student's output, standardised, by token type.

        Args:
            output: of the student.
            places: [K] int64, numbers of the patches that are wanted, row by row of the grid; None: all.

        Returns:
            ``summary`` [B, D], and ``patches`` [B, gh, gw, D], or [B, K, D] where places are given.
        """
        tokens = self.rule.align_student(output.feature_map)
        predicted = {"patches": self.heads["patches"](_at(tokens, places))}
        if "summary" in self.heads:
            predicted["summary"] = self.heads["summary"](output.summary)
        return predicted

    def targets(
        self,
        raw: Mapping[str, Tensor],
        codecs: Mapping[str, FeatureCodec] | None = None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Standardised features on the same grids, by token type, in the shapes of `predict`.

        Args:
            raw: by token type, [B, row_bytes] uint8 as stored, on the student's device.
            codecs: decoders of the dataset that `raw` is of, whose projections are its own; None: the training images'.
            places: as in `predict`; what is not wanted is not decoded, unless patches are averaged.
        """
        averaged = self.rule.grid != self.rule.teacher
        wanted = {"patches": None if averaged else places}
        # Autocast would take the projections to bfloat16; stored features are worth more than that.
        with torch.autocast(raw["patches"].device.type, enabled=False):
            target = {kind: self._target(kind, raw[kind], codecs, wanted.get(kind)) for kind in self.heads}
        if averaged:
            target["patches"] = _at(self.rule.align_teacher(target["patches"]), places)
        return target

    def _target(
        self, kind: str, rows: Tensor, codecs: Mapping[str, FeatureCodec] | None, places: Tensor | None
    ) -> Tensor:
        decoder = self.codecs[kind] if codecs is None else codecs[kind].to(rows.device)
        assert isinstance(decoder, FeatureCodec)
        features = decoder.decode(rows, places)
        return features if codecs is None and kind in self.folded else self.standardisers[kind](features)

    def losses(self, output: StudentOutput, raw: Mapping[str, Tensor], step: Tensor | None = None) -> dict[str, Tensor]:
        """[B] float32 by part: ``patches``, ``summary`` where there is one, and in training each relation asked for.

        Args:
            output: of the student.
            raw: as in `targets`.
            step: scalar int64, of which the turn of patches that are compared is taken (`turns`); None: all are.
        """
        places = None if step is None or len(self.patch_subsets) == 1 else self._patch_subset(step)
        predicted, target = self.predict(output, places), self.targets(raw, places=places)
        terms = {"patches": self.loss.patches, "summary": self.loss.summary}
        parts = {kind: vector_loss(terms[kind], predicted[kind], target[kind]) for kind in predicted}
        if self.queue is not None and self.training:
            past = self.queue.past()
            for name in self.relations:
                parts[name] = RELATIONS[name](predicted["summary"], target["summary"], *past, self.loss.temperature)
        return parts

    def remember(self, rows: Tensor) -> None:
        """Take into the queue what the teacher said in a step: summaries [B, row_bytes] uint8 as stored, on the device."""
        assert self.queue is not None
        self.queue.push(self._target("summary", rows, None, None))

    def _patch_subset(self, step: Tensor) -> Tensor:
        # Indexing with a 0-d tensor forces a synchronisation with the GPU.
        return self.patch_subsets.index_select(0, (step % len(self.patch_subsets)).view(1)).squeeze(0)

    def shares(self) -> dict[str, list[float]]:
        """By part of `losses`, how often the teacher's weights of summary and patches enter its share of the total."""
        related = {name: [weight, 0.0] for name, weight in self.relations.items() if self.queue is not None}
        own = {kind: [float(kind == column) for column in FEATURE_KINDS] for kind in self.heads}
        return {**own, **related}


class Distiller(nn.Module):
    """Student and targets; its forward is the loss, so that one DDP wrapper sees every parameter.

    Args:
        student: backbone and neck.
        teachers: with `standardisers` and `codecs` (decoders) by teacher id and token type.
        image_size: side of the student's input in pixels.
        hidden: channels of the heads' hidden layer.
        loss: what is compared, and how.
    """

    weights: Tensor
    shares: Tensor

    def __init__(
        self,
        student: Student,
        teachers: Sequence[CachedTeacher],
        standardisers: Mapping[str, Mapping[str, Standardiser]],
        codecs: Mapping[str, Mapping[str, FeatureCodec]],
        image_size: int,
        hidden: int,
        loss: LossConfig,
    ) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self.labels = teacher_labels(teachers)
        grid = feature_map_size(student, image_size)
        self.targets = nn.ModuleList(
            TeacherTarget(teacher, standardisers[teacher.id], codecs[teacher.id], student, grid, hidden, loss)
            for teacher in teachers
        )
        self.register_buffer("weights", teacher_weights(teachers), persistent=False)
        self.parts, shares = self._table()
        self.register_buffer("shares", shares, persistent=False)

    def _table(self) -> tuple[list[str], Tensor]:
        """All parts of the loss, those of training alone last, and how the weights [T, 2] enter the total of each: [P, T, 2]."""
        rows = []
        for number, target in enumerate(self.targets):
            assert isinstance(target, TeacherTarget)
            for part, share in target.shares().items():
                table = torch.zeros_like(self.weights)
                table[number] = torch.tensor(share)
                rows.append((part in RELATIONS, f"{self.labels[target.teacher.id]}/{part}", table))
        rows.sort(key=itemgetter(0))
        return [name for _, name, _ in rows], torch.stack([table for *_, table in rows])

    def remembering(self) -> list[TeacherTarget]:
        """The targets that have a queue."""
        return [target for target in self.targets if isinstance(target, TeacherTarget) and target.queue is not None]

    def forward(
        self,
        pixels: Tensor,
        features: Mapping[str, Mapping[str, Tensor]],
        weights: Tensor | None = None,
        draws: Tensor | None = None,
        step: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            pixels: [B, 3, H, W] uint8.
            features: by teacher id and token type, [B, row_bytes] uint8 as stored.
            weights: [T, 2] of summary and patches by teacher, now; None: those of the start.
            draws: [B, T] uniform in [0, 1), by which teachers are dropped; None: none is.
            step: scalar int64, its number, which decides the patches that are compared; None: all are.

        Returns:
            The weighted total, and every unweighted part as ``<teacher's label>/<token type>``, detached; with dropping
            also the share of the images that each teacher was kept for, ``<teacher's label>/kept``.
        """
        output = self.student(pixels)
        weights = self.weights if weights is None else weights
        found: dict[str, Tensor] = {}
        for target in self.targets:
            assert isinstance(target, TeacherTarget)
            losses = target.losses(output, features[target.teacher.id], step)
            found |= {f"{self.labels[target.teacher.id]}/{part}": loss for part, loss in losses.items()}
        # All parts at once: what is done to each by itself are small kernels, as many as there are parts.
        stacked = torch.stack([found[name] for name in self.parts if name in found], dim=1)
        means = stacked.mean(dim=0)
        parts = dict(zip(self.parts, means.detach().unbind(), strict=False))
        shares = (self.shares[: len(found)] * weights).sum(dim=-1)
        if draws is None:
            return (means * shares.sum(dim=1)).sum(), parts
        totals = (stacked.unsqueeze(-1) * shares).sum(dim=1)
        factors = drop_coefficients(totals, weights.sum(dim=1), draws, self.loss.drop)
        kept = (factors > 0).float().mean(dim=0)
        parts |= {f"{label}/kept": share for label, share in zip(self.labels.values(), kept, strict=True)}
        return (factors * totals).sum(dim=1).mean(), parts


def _at(patches: Tensor, places: Tensor | None) -> Tensor:
    return patches if places is None else patches.flatten(1, 2).index_select(1, places)


@torch.no_grad()
def feature_map_size(student: Student, image_size: int) -> tuple[int, int]:
    """(h, w) of the student's tokens for a square input, found by one forward in evaluation mode.

    Raises:
        UserError: where the student does not take such an input.
    """
    training = student.training
    student.eval()
    parameter = next(student.parameters())
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=parameter.device)
    try:
        height, width = student(pixels).feature_map.shape[-2:]
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(
            f"student.input_size: the student takes no {image_size} x {image_size} images: {reason}"
        ) from error
    student.train(training)
    return height, width
