"""A classifier from words: a student, its CLIP head and the embeddings of class names as one network without a text tower."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.export.bundle import ExportBundle
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import Encoder
from pipeline.voices.heads import Summaries
from pipeline.voices.texts import check_classes, embed_classes, make_templates
from pipeline.voices.words import find_summaries, open_tower

FORMATS = ("torch_export", "onnx", "coreml")
"""Formats that hold such a network. The others rebuild a model from its weights, and know no such head."""


class WordClassifier(nn.Module):
    """A student whose logits are scale * cosine of image and class + bias.

    Args:
        classes: embeddings [K, D] of length 1.
        scale, bias: of the text tower's logits.
    """

    classes: Tensor

    def __init__(self, model: Summaries, classes: Tensor, scale: float, bias: float) -> None:
        super().__init__()
        self.model, self.scale, self.bias = model, scale, bias
        self.register_buffer("classes", classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> logits [B, K]."""
        return self.scale * F.normalize(self.model(images), dim=1) @ self.classes.T + self.bias


def classifier_bundle(
    student: LoadedStudent,
    size: int,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    teacher: str | None = None,
    text_weights: str | None = None,
) -> ExportBundle:
    """A classifier for inputs of `size` pixels, to export in `FORMATS`.

    Args:
        classes, templates: as in :meth:`~pipeline.voices.words.Words.classify`.
        teacher, text_weights: as in :func:`~pipeline.voices.words.load_words`.

    Raises:
        UserError, TeacherError: if the student has no CLIP head, or the classes cannot be embedded.
    """
    check_classes(classes)
    made = make_templates(templates)
    model, kept = find_summaries(student, teacher)
    assert isinstance(model.encoder, Encoder)
    tower = open_tower(kept, text_weights).to("cuda" if torch.cuda.is_available() else "cpu")
    network = WordClassifier(model, embed_classes(tower, classes, made), tower.logit_scale, tower.logit_bias).eval()
    turned = (
        "the sigmoid gives the probability of each class by itself" if tower.sigmoid else "softmax gives probabilities"
    )
    name = student.name.removeprefix("timm/")
    return ExportBundle(
        f"{name} classifier from words",
        name,
        student.args,
        network,
        {"logits": f"a score for each class; {turned}"},
        size,
        classes=tuple(classes),
        provenance={**student.provenance, "words": {"teacher": kept.name, "templates": list(templates)}},
    )
