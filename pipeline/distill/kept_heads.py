"""Neck and heads beside an exported student, for those who want what the teachers would have said.

    heads.safetensors    neck, heads and standardisation
    heads.json           what they are: taps, widths, teachers

``load_heads(folder)`` brings them back with the student. A run exports them where `student.keep_heads` is set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.cache.layout.phi_s import PhiS
from pipeline.distill.distiller import Distiller, TeacherTarget
from pipeline.distill.standardise import MeanStd, Rotation, Standardiser
from pipeline.errors import UserError, one_line
from pipeline.student.heads import distillation_head
from pipeline.student.model import Student, StudentOutput, load_encoder

FILES = ("heads.safetensors", "heads.json")

_ENCODER = "student.encoder."


class StudentWithHeads(nn.Module):
    """A student that answers for its teachers, in each teacher's own scale.

    Args:
        student: backbone and neck.
        teachers: by label, the heads and the standardisation that is undone on what they predict, by token type.
        described: what :func:`load_heads` builds the heads from.
    """

    def __init__(
        self,
        student: Student,
        teachers: Mapping[str, tuple[nn.ModuleDict, nn.ModuleDict]],
        described: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.described = described
        self.student = student
        self.labels = list(teachers)  # a label may hold a dot, which the name of a module must not
        self.heads = nn.ModuleList(heads for heads, _ in teachers.values())
        self.standardisers = nn.ModuleList(standardisers for _, standardisers in teachers.values())

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """[B, 3, H, W] float32 RGB in [0, 1] -> by teacher and token type: patches [B, h, w, D], summary [B, D].

        The patches lie on the student's own grid.
        """
        return self.predict_features(self.student.encode(images))

    def predict_features(self, output: StudentOutput) -> dict[str, dict[str, Tensor]]:
        """The same from what the student gave."""
        seen = {"patches": output.feature_map.permute(0, 2, 3, 1), "summary": output.summary}
        answers: dict[str, dict[str, Tensor]] = {}
        for label, heads, standardisers in zip(self.labels, self.heads, self.standardisers, strict=True):
            pairs = zip(heads.items(), standardisers.values(), strict=True)  # type: ignore[operator]
            answers[label] = {kind: standardiser.inverse(head(seen[kind])) for (kind, head), standardiser in pairs}
        return answers


def save_heads(distiller: Distiller, hidden: int, folder: Path) -> None:
    """Write them beside an exported student.

    Args:
        hidden: channels of the heads' hidden layer.
    """
    parts = {}
    described: dict[str, Any] = {"hidden": hidden, "standardise": distiller.loss.standardise, "teachers": []}
    for target in distiller.targets:
        assert isinstance(target, TeacherTarget)
        label = distiller.labels[target.teacher.id]
        parts[label] = (target.heads, target.standardisers)
        channels = {kind: shape[-1] for kind, shape in target.teacher.shapes.items()}
        described["teachers"].append({"label": label, "id": target.teacher.id, "channels": channels})
    whole = StudentWithHeads(distiller.student, parts, described)
    write_heads(whole, folder)


def write_heads(whole: StudentWithHeads, folder: Path) -> None:
    """Write the neck and heads of a student beside it."""
    state = whole.state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(_ENCODER)},
        folder / FILES[0],
    )
    student = whole.student
    description = {"taps": student.tap_strides, "token_dim": student.token_dim, **whole.described}
    (folder / FILES[1]).write_text(json.dumps(description, indent=2), encoding="utf-8")


def load_heads(folder: Path) -> StudentWithHeads:
    """An exported student with its heads, in evaluation mode.

    Raises:
        UserError: where the folder holds none, or they do not fit.
    """
    encoder = load_encoder(folder)
    try:
        described = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        student = Student(encoder, described["token_dim"], described["taps"])
        dims = {"summary": encoder.dim, "patches": student.token_dim}
        parts = {}
        for teacher in described["teachers"]:
            widths = teacher["channels"].items()
            heads = {kind: distillation_head(dims[kind], described["hidden"], width) for kind, width in widths}
            standardisers = {kind: _blank(described["standardise"], width) for kind, width in widths}
            parts[teacher["label"]] = (nn.ModuleDict(heads), nn.ModuleDict(standardisers))
        whole = StudentWithHeads(student, parts, {key: described[key] for key in ("hidden", "standardise", "teachers")})
        missing, unknown = whole.load_state_dict(load_file(folder / FILES[0]), strict=False)
        if odd := [*unknown, *(name for name in missing if not name.startswith(_ENCODER))]:
            raise ValueError(f"{odd[0]} is on one side alone")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no heads that fit its student ({one_line(error)}): set student.keep_heads=true "
            "in the distillation that exports it"
        ) from error
    return whole.eval()


def _blank(method: str, width: int) -> Standardiser:
    if method == "phi_s":
        return Rotation(PhiS(np.zeros(width), np.eye(width), 1.0))
    return MeanStd(np.zeros(width), np.ones(width))
