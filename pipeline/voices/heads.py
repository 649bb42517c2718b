"""The head of one teacher among those that a student keeps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.distill.kept_heads import StudentWithHeads, cached_form, load_heads
from pipeline.errors import UserError
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import LoadedStudent, load_student
from pipeline.student.model import Encoder


@dataclass(frozen=True)
class KeptTeacher:
    """A teacher whose features a student predicts.

    Attributes:
        label: as in the run that distilled it.
        name: of the teacher's specification (`clip/ViT-B-16@openai`).
        weights: their identity, as in :attr:`teachers.base.TeacherSpec.weights`; "" if unknown.
        cached: its entry in the cache; None if unknown.
        heads, standardisers: by kind of feature.
    """

    label: str
    name: str
    weights: str
    cached: CachedTeacher | None
    heads: nn.ModuleDict
    standardisers: nn.ModuleDict


class Summaries(nn.Module):
    """A student that predicts a teacher's summary, in the teacher's own scale.

    Attributes:
        dim: channels D of the teacher's summary.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, standardiser: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder, self.head, self.standardiser, self.dim = encoder, head, standardiser, dim

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> [B, D]."""
        return self.predict(self.encoder(images))

    def predict(self, vectors: Tensor) -> Tensor:
        """The same from the encoder's vectors [B, C]."""
        predicted: Tensor = self.standardiser.inverse(self.head(vectors))  # type: ignore[operator]
        return predicted


def open_student(student: str, tracking_uri: str = "", weights: str = "pretrained") -> LoadedStudent:
    """A student by its folder, address or MLflow URI, or a timm model with these weights; UserError if there is none."""
    return load_student(fetch_student(student, tracking_uri), weights=weights)


def kept_teachers(student: LoadedStudent, kind: str, remedy: str) -> tuple[StudentWithHeads, list[KeptTeacher]]:
    """The student with its heads, and all teachers that they are of; UserError, with the remedy, if it keeps none."""
    if student.folder is None:
        raise UserError(f"{student.name} is not a distilled student, so it has no head of {kind}: {remedy}")
    if not (student.folder / "heads.json").is_file():
        raise UserError(f"{student.folder} keeps no heads of its teachers: {remedy}")
    whole = load_heads(student.folder)
    entries = whole.description["teachers"]
    return whole, [_kept(*parts) for parts in zip(entries, whole.heads, whole.standardisers, strict=True)]


def find_teacher(
    student: LoadedStudent, wanted: Callable[[str], bool], kind: str, label: str | None = None
) -> tuple[StudentWithHeads, KeptTeacher]:
    """The student with its heads, and the teacher that is wanted.

    Args:
        wanted: whether a teacher of this name is of the kind.
        kind: in words, with a name that makes one: `CLIP (clip/ViT-B-16@openai)`.
        label: of the teacher; None: the only one that is wanted.

    Raises:
        UserError: if the student keeps no heads, none of the kind, or several, and none is named; with the remedy.
    """
    remedy = f"distil it with a {kind} teacher and student.keep_heads=true"
    whole, kept = kept_teachers(student, kind, remedy)
    known = ", ".join(teacher.label for teacher in kept)
    if label is not None:
        found = [teacher for teacher in kept if teacher.label == label]
        if not found:
            raise UserError(f"teacher {label}: {student.folder} keeps no head of it; it keeps those of {known}")
    else:
        found = [teacher for teacher in kept if wanted(teacher.name)]
        if len(found) > 1:
            several = ", ".join(teacher.label for teacher in found)
            raise UserError(f"{student.folder} keeps heads of several teachers of this kind: name one of {several}")
    if not found:
        raise UserError(f"{student.folder} keeps no head of {kind}, only of {known}: {remedy}")
    return whole, found[0]


def out_channels(head: nn.Module) -> int:
    """Channels that a head of :func:`~pipeline.student.model.distillation_head` gives."""
    assert isinstance(head, nn.Sequential)
    last = head[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features


def _kept(described: Mapping[str, Any], heads: nn.Module, standardisers: nn.Module) -> KeptTeacher:
    assert isinstance(heads, nn.ModuleDict)
    assert isinstance(standardisers, nn.ModuleDict)
    cached = cached_form(described)
    name, weights = (cached.spec.name, cached.spec.weights) if cached else (described["label"], "")
    return KeptTeacher(described["label"], name, weights, cached, heads, standardisers)
