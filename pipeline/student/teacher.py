"""An exported student as a teacher, for a smaller one to learn from (proxy distillation): `student`.

    teachers:
      - model: student
        weights: work/runs/<run>/student

The summary is the student's own. Patches are the levels that the neck fuses by default, resized to the grid of stride 16
and concatenated along the channels.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError, one_line
from pipeline.student.model import TAPS, Encoder, create_backbone, level_at_stride, load_encoder
from teachers.base import (
    Teacher,
    TeacherError,
    TeacherOptions,
    TeacherOutput,
    TeacherSpec,
    WeightsNotFoundError,
    digest_state,
    pool_grid,
)
from teachers.variants import pooled_grid
from teachers.weights import parse_weights


class StudentTeacher(Teacher):
    """The backbone of an exported student, in `folder`; its `student.json` has the `args`."""

    encoder: Encoder

    def __init__(self, folder: Path, options: TeacherOptions) -> None:
        self.folder, self.pool = folder, options.pool or 1
        described = _description(folder)
        name = f"student/{described['model']}"
        if options.args:
            raise TeacherError(f"teacher {name}: args are those of {folder / 'student.json'}; remove them")
        size = options.input_size or described["input_size"]
        summary_dim, patch_dim, grid = self._probe(described, size)
        self.spec = TeacherSpec(
            name=name,
            architecture=name,
            weights=parse_weights(str(folder / "student.safetensors"), name, "").identity,
            input_size=(size, size),
            mean=described["mean"],
            std=described["std"],
            interpolation="bicubic",
            summary_dim=summary_dim,
            patch_dim=patch_dim,
            grid=pooled_grid(name, grid, self.pool),
            pool=self.pool,
            model_args=described["args"],
            licence="as its teachers'",
        )

    def _probe(self, described: dict[str, Any], size: int) -> tuple[int, int, tuple[int, int]]:
        """Channels of summary and patch, and the grid."""
        try:
            with torch.device("meta"):
                encoder = Encoder(create_backbone(described["model"], described["args"])).eval()
                summary, patches = _features(encoder, torch.empty(1, 3, size, size))
        except UserError as error:
            raise TeacherError(f"teacher student: {self.folder}: {error}") from error
        except (AssertionError, RuntimeError, ValueError) as error:
            name, reason = described["model"], one_line(error)
            raise TeacherError(f"teacher student/{name}: it does not accept input_size {size} ({reason})") from error
        return summary.shape[-1], patches.shape[-1], (patches.shape[1], patches.shape[2])

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights; see :meth:`teachers.base.Teacher.load`."""
        try:
            encoder = load_encoder(self.folder)
        except UserError as error:
            raise TeacherError(f"teacher {self.spec.name}: {error}") from error
        self.weights_sha256 = digest_state(encoder.backbone)
        self.device, self.dtype = torch.device(device), dtype
        self.encoder = encoder.requires_grad_(False).to(self.device, dtype)

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] normalised -> summary [B, C] and patches [B, h, w, D]."""
        summary, patches = _features(self.encoder, images)
        return TeacherOutput(summary, pool_grid(patches, self.pool))


def _features(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    levels = sorted({level_at_stride(encoder.strides, tap) for tap in TAPS} | {len(encoder.channels) - 1})
    maps = encoder.pyramid(images, levels)
    size = maps[0].shape[-2:]
    resized = [maps[0], *(F.interpolate(part, size, mode="bilinear", align_corners=False) for part in maps[1:])]
    return maps[-1].mean(dim=(2, 3)), torch.cat(resized, dim=1).permute(0, 2, 3, 1)


def _description(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        described |= {key: tuple(float(value) for value in described[key]) for key in ("mean", "std")}
        return {key: described[key] for key in ("model", "args", "input_size", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsNotFoundError(
            f"teacher student: weights: {folder} is not the folder of an exported student, with student.json and "
            f"student.safetensors ({one_line(error)})"
        ) from error


def student(options: TeacherOptions) -> Teacher:
    """Factory of `student`, as `pipeline.student.teacher:student`."""
    if options.weights == "pretrained" or options.weights.startswith("random"):
        raise TeacherError(
            f"teacher student: weights={options.weights} is not a student; set the folder that a distillation exported, "
            "work/runs/<run>/student"
        )
    return StudentTeacher(Path(options.weights).expanduser().resolve(), replace(options, variant=""))
