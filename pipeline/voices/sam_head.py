"""The head of a student that predicts SAM's embedding of an image."""

from pathlib import Path

from torch import Tensor, nn

from pipeline.distill.kept_heads import load_heads
from pipeline.errors import UserError
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import Student

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
    if loaded.folder is None:
        raise UserError(f"{loaded.name} is not a distilled student, so it has no head of SAM: {REMEDY}")
    if not Path(loaded.folder, "heads.json").is_file():
        raise UserError(f"{loaded.folder} keeps no heads of its teachers: {REMEDY}")
    whole = load_heads(loaded.folder)
    entries = whole.description["teachers"]
    found = [place for place, label in enumerate(whole.labels) if label.startswith("sam") and _is_map(entries[place])]
    if not found:
        raise UserError(f"{loaded.folder} keeps no head of SAM, only of {', '.join(whole.labels)}: {REMEDY}")
    place = found[-1]  # of several, that of the last in the recipe
    heads, standardisers = whole.heads[place], whole.standardisers[place]
    assert isinstance(heads, nn.ModuleDict)
    assert isinstance(standardisers, nn.ModuleDict)
    dim = entries[place]["channels"]["patches"]
    return Embeddings(whole.student, heads["patches"], standardisers["patches"], whole.labels[place], dim).eval()


def _is_map(entry: dict[str, dict[str, int]]) -> bool:
    return "patches" in entry["channels"]
