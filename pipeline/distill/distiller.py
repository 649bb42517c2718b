"""The module that is trained: student, heads, and each teacher's frozen standardisation and grid rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.cache.codec import TokenCodec
from pipeline.cache.extract import CachedTeacher, teacher_labels
from pipeline.cache.stats import Moments
from pipeline.distill.grid import GridRule
from pipeline.distill.loss import patch_loss, standardise, summary_loss
from pipeline.errors import UserError
from pipeline.student.heads import distillation_head
from pipeline.student.model import Student, StudentOutput


class TeacherTarget(nn.Module):
    """One teacher's side of the loss: heads onto its features, its frozen statistics, its grid rule and weights."""

    summary_mean: Tensor
    summary_std: Tensor
    patches_mean: Tensor
    patches_std: Tensor

    def __init__(
        self,
        teacher: CachedTeacher,
        stats: Mapping[str, Moments],
        tokens: Mapping[str, TokenCodec],
        student: Student,
        token_dim: int,
        grid: tuple[int, int],
        hidden: int,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.rule = GridRule(grid, teacher.spec.grid)
        self.tokens = nn.ModuleDict(tokens)
        self.heads = nn.ModuleDict()
        dims = {"summary": student.encoder.dim, "patches": token_dim}
        for kind, shape in teacher.shapes.items():
            self.heads[kind] = distillation_head(dims[kind], hidden, shape[-1])
            self.register_buffer(f"{kind}_mean", torch.from_numpy(stats[kind].mean).float())
            self.register_buffer(f"{kind}_std", torch.from_numpy(stats[kind].std).float())

    def losses(self, output: StudentOutput, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss over the batch by token type.

        Args:
            output: of the student.
            raw: by token type, [B, row_bytes] uint8 as stored, on the student's device.
        """
        losses = {}
        patches = self._decode("patches", raw)
        target = self.rule.align_teacher(standardise(patches, self.patches_mean, self.patches_std))
        losses["patches"] = patch_loss(self.heads["patches"](self.rule.align_student(output.tokens)), target).mean()
        if "summary" in self.tokens:
            target = standardise(self._decode("summary", raw), self.summary_mean, self.summary_std)
            losses["summary"] = summary_loss(self.heads["summary"](output.summary), target).mean()
        return losses

    def _decode(self, kind: str, raw: Mapping[str, Tensor]) -> Tensor:
        tokens = self.tokens[kind]
        assert isinstance(tokens, TokenCodec)
        # Autocast would take the projection to bfloat16; stored features are worth more than that.
        with torch.autocast(raw[kind].device.type, enabled=False):
            return tokens.decode(raw[kind])

    def weight(self, kind: str) -> float:
        """Weight of a token type in the total loss."""
        config = self.teacher.config
        return config.weight * (config.summary_weight if kind == "summary" else config.patch_weight)


class Distiller(nn.Module):
    """Student and targets; its forward is the loss, so that one DDP wrapper sees every parameter.

    Args:
        student: backbone and neck.
        teachers: with `stats` and `tokens` (decoders) by teacher id.
        image_size: side of the student's input in pixels.
        token_dim, hidden: channels of the tokens and of the heads' hidden layer.
    """

    def __init__(
        self,
        student: Student,
        teachers: Sequence[CachedTeacher],
        stats: Mapping[str, Mapping[str, Moments]],
        tokens: Mapping[str, Mapping[str, TokenCodec]],
        image_size: int,
        token_dim: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.labels = teacher_labels(teachers)
        grid = token_grid(student, image_size)
        self.targets = nn.ModuleList(
            TeacherTarget(teacher, stats[teacher.id], tokens[teacher.id], student, token_dim, grid, hidden)
            for teacher in teachers
        )

    def forward(self, pixels: Tensor, features: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            pixels: [B, 3, H, W] uint8.
            features: by teacher id and token type, [B, row_bytes] uint8 as stored.

        Returns:
            The weighted total, and every unweighted part as ``<teacher's label>/<token type>``, detached.
        """
        output = self.student(pixels)
        total = pixels.new_zeros((), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        for target in self.targets:
            assert isinstance(target, TeacherTarget)
            for kind, loss in target.losses(output, features[target.teacher.id]).items():
                total = total + target.weight(kind) * loss
                parts[f"{self.labels[target.teacher.id]}/{kind}"] = loss.detach()
        return total, parts


@torch.no_grad()
def token_grid(student: Student, image_size: int) -> tuple[int, int]:
    """(h, w) of the student's tokens for a square input, found by one forward in evaluation mode.

    Raises:
        UserError: where the student does not take such an input.
    """
    training = student.training
    student.eval()
    parameter = next(student.parameters())
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=parameter.device)
    try:
        height, width = student(pixels).tokens.shape[-2:]
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"student.input_size: the student takes no {image_size} x {image_size} images: {reason}"
        ) from error
    student.train(training)
    return height, width
