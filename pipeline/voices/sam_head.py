"""The head of a student that predicts SAM's embedding of an image."""

from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import Student
from pipeline.voices.heads import kept_teachers, out_channels

REMEDY = "distil it with a SAM teacher (sam/vit_b) and student.keep_heads=true, as recipes/promptable.yaml does"


class Embeddings(nn.Module):
    """A student that predicts SAM's embedding of an image, in SAM's own scale, on its own grid of stride 16.

    Attributes:
        label: of the teacher in the run that distilled the student, such as `sam/vit_b`.
        dim: channels D of the embedding.
    """

    def __init__(self, student: Student, head: nn.Module, standardiser: nn.Module, label: str, dim: int) -> None:
        super().__init__()
        self.student, self.head, self.standardiser = student, head, standardiser
        self.label, self.dim = label, dim

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> [B, D, h, w]."""
        tokens = self.head(self.student.encode(images).feature_map.permute(0, 2, 3, 1))
        predicted: Tensor = self.standardiser.inverse(tokens)  # type: ignore[operator]
        return predicted.permute(0, 3, 1, 2)


def sam_embeddings(loaded: LoadedStudent) -> Embeddings:
    """The SAM head of a student, in evaluation mode.

    Raises:
        UserError: if it keeps no heads, or none of a SAM; with the remedy.
    """
    whole, kept = kept_teachers(loaded, "SAM", REMEDY)
    found = [teacher for teacher in kept if teacher.label.startswith("sam") and "patches" in teacher.heads]
    if not found:
        raise UserError(f"{loaded.folder} keeps no head of SAM, only of {', '.join(whole.labels)}: {REMEDY}")
    teacher = found[-1]  # of several, that of the last in the recipe
    head, standardiser = teacher.heads["patches"], teacher.standardisers["patches"]
    return Embeddings(whole.student, head, standardiser, teacher.label, out_channels(head)).eval()
