"""Maps of patch features of images: those that a student predicts of a teacher, or those of its own backbone."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.distill.kept_heads import StudentWithHeads
from pipeline.errors import UserError
from pipeline.predict.predictor import Predictor
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import MAP_STRIDE, Encoder, level_at_stride
from pipeline.voices.heads import KeptTeacher, find_teacher, out_channels

BACKBONE = "backbone"
"""In the place of a teacher's label: the backbone's own map."""
KIND = "DINOv2 (dinov2/vitb14)"


class TeacherPatches(nn.Module):
    """A student that predicts a teacher's patches, of `dim` channels, in the teacher's own scale, on its own grid."""

    def __init__(self, whole: StudentWithHeads, teacher: KeptTeacher) -> None:
        super().__init__()
        self.student = whole.student
        self.head, self.standardiser = teacher.heads["patches"], teacher.standardisers["patches"]
        self.dim = out_channels(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> [B, h, w, D], of stride 16 or the finest that exists."""
        tokens = self.head(self.student.encode(images).feature_map.permute(0, 2, 3, 1))
        patches: Tensor = self.standardiser.inverse(tokens)  # type: ignore[operator]
        return patches


class BackbonePatches(nn.Module):
    """The deepest map of a backbone whose stride is at most 16, of `dim` channels."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.level = encoder, level_at_stride(encoder.strides, MAP_STRIDE)
        self.dim = encoder.channels[self.level]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> [B, h, w, C]."""
        return self.encoder.maps(images, [self.level])[0].permute(0, 2, 3, 1)


def find_patches(student: LoadedStudent, teacher: str | None = None) -> tuple[nn.Module, str]:
    """A model that gives maps of patches, and whose they are.

    Args:
        teacher: label of a teacher, or `backbone`; None: the student's DINOv2 or DINOv3 head, and for a timm model, which has
            no heads, its own map.

    Raises:
        UserError: if the student has no such head, with the remedy.
    """
    if teacher == BACKBONE or (teacher is None and student.folder is None):
        if not isinstance(student.encoder, Encoder):
            raise UserError(
                f"{student.name}: this model returns one vector per image, no maps: name the exported student"
            )
        return BackbonePatches(student.encoder).eval(), f"the backbone {student.name.removeprefix('timm/')}"
    try:
        whole, kept = find_teacher(student, is_dino, KIND, teacher)
    except UserError as error:
        own = "" if teacher else f"; --teacher {BACKBONE} takes the backbone's own map"
        raise UserError(f"{error}{own}") from error
    return TeacherPatches(whole, kept).eval(), f"the head of {kept.label}"


def is_dino(name: str) -> bool:
    """Whether a teacher of this name is of the DINO family, whose patches are alike where parts are alike."""
    return name.startswith(("dinov2/", "dinov3/", "timm/")) and "dino" in name


def load_patches(
    student: LoadedStudent,
    teacher: str | None = None,
    *,
    input_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
) -> tuple[Predictor, str]:
    """A predictor whose `features` are maps [N, h, w, D], and whose they are; raises as :func:`find_patches`.

    Images are resized to squares of `input_size` pixels, as in training; positions of the grid are shares of the image's sides.
    """
    model, whose = find_patches(student, teacher)
    size = input_size or student.input_size or 224
    return Predictor(model, student.name, size, device, batch_size), whose
