"""Neck and heads exported with a student, which predict the teachers' features.

    heads.safetensors    neck, heads and standardisation
    heads.json           taps, widths and teachers

``load_heads(folder)`` loads them with the student. A run exports them if `student.keep_heads` is set.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.distill.distiller import Distiller
from pipeline.distill.standardise import neutral_standardiser
from pipeline.errors import UserError, one_line
from pipeline.student.model import Student, StudentOutput, distillation_head, load_encoder, save_described
from teachers.base import TeacherSpec

FILES = ("heads.safetensors", "heads.json")

_ENCODER = "student.encoder."


class StudentWithHeads(nn.Module):
    """A student that predicts its teachers' features, in each teacher's own scale.

    Args:
        student: backbone and neck.
        teachers: by label, the heads and the standardisers whose inverse is applied to predictions, each by kind.
        description: from which :func:`load_heads` builds the heads.
    """

    def __init__(
        self,
        student: Student,
        teachers: Mapping[str, tuple[nn.ModuleDict, nn.ModuleDict]],
        description: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.student, self.description = student, description
        self.labels = list(teachers)  # not module names, which must not contain dots
        self.heads = nn.ModuleList(heads for heads, _ in teachers.values())
        self.standardisers = nn.ModuleList(standardisers for _, standardisers in teachers.values())

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """[B, 3, H, W] float32 RGB in [0, 1] -> by teacher, ``patches`` [B, h, w, D] at stride 16 and ``summary`` [B, D]."""
        return self.predict_features(self.student.encode(images))

    def predict_features(self, output: StudentOutput) -> dict[str, dict[str, Tensor]]:
        """The same from the student's output."""
        features = {"patches": output.feature_map.permute(0, 2, 3, 1), "summary": output.summary}
        predicted: dict[str, dict[str, Tensor]] = {}
        for label, heads, standardisers in zip(self.labels, self.heads, self.standardisers, strict=True):
            pairs = zip(heads.items(), standardisers.values(), strict=True)  # type: ignore[operator]
            predicted[label] = {
                kind: standardiser.inverse(head(features[kind])) for (kind, head), standardiser in pairs
            }
        return predicted


def save_heads(distiller: Distiller, hidden: int, folder: Path) -> None:
    """Write neck and heads, of `hidden` channels, into the folder of an exported student."""
    parts = {}
    description: dict[str, Any] = {"hidden": hidden, "standardise": distiller.loss.standardise, "teachers": []}
    for label, target in distiller.labelled_targets():
        parts[label] = (target.heads, target.standardisers)
        teacher = target.teacher
        channels = {kind: shape[-1] for kind, shape in teacher.shapes.items()}
        stored = {"spec": asdict(teacher.spec), "codec": teacher.codec, "precision": teacher.precision}
        description["teachers"].append({"label": label, "id": teacher.id, "channels": channels, **stored})
    write_heads(StudentWithHeads(distiller.student, parts, description), folder)


def write_heads(whole: StudentWithHeads, folder: Path) -> None:
    """Write the neck and heads of a student."""
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith(_ENCODER)}
    student = whole.student
    description = {"taps": student.tap_strides, "token_dim": student.token_dim, **whole.description}
    save_described(state, description, folder, "heads")


def cached_form(described: Mapping[str, Any]) -> CachedTeacher | None:
    """A teacher in the cache, from its entry in heads.json; None if the entry is of a version that did not describe it."""
    if "spec" not in described:
        return None
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in described["spec"].items()
    }
    spec = TeacherSpec(**fields)
    config = TeacherConfig(model=spec.name)
    return CachedTeacher(config, spec, described["id"], described["codec"], described["precision"])


def load_heads(folder: Path) -> StudentWithHeads:
    """An exported student with its heads, in evaluation mode.

    Raises:
        UserError: if the folder has none, or they do not fit.
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
            standardisers = {kind: neutral_standardiser(described["standardise"], width) for kind, width in widths}
            parts[teacher["label"]] = (nn.ModuleDict(heads), nn.ModuleDict(standardisers))
        whole = StudentWithHeads(student, parts, {key: described[key] for key in ("hidden", "standardise", "teachers")})
        missing, unknown = whole.load_state_dict(load_file(folder / FILES[0]), strict=False)
        if odd := [*unknown, *(name for name in missing if not name.startswith(_ENCODER))]:
            raise ValueError(f"{odd[0]} is in only one of heads.safetensors and heads.json")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} has no heads that fit its student ({one_line(error)}): set student.keep_heads=true "
            "in the distillation that exports it"
        ) from error
    return whole.eval()
