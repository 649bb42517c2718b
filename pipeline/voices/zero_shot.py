"""Zero-shot classification of labelled images by the names of their classes (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluate.knn import labelled
from pipeline.voices.config import WordsConfig
from pipeline.voices.measured import WordsPlan, student_embeddings, teacher_embeddings
from pipeline.voices.texts import embed_classes, make_templates, read_classes


def class_names(plan: WordsPlan, config: WordsConfig) -> tuple[str, ...]:
    """Names by label: `words.classes`, or those of the source.

    Raises:
        UserError: if there are none, or not one for each label; if the images have no labels.
    """
    split = plan.split
    if not split.labelled:
        raise UserError(f"data.val: {split.source.location} has no labels, which this evaluation needs")
    own = tuple(split.source.classes)
    if config.classes is None:
        if not own:
            raise UserError(
                f"words.classes: {split.source.location} has no names of its classes; give one for each label"
            )
        return own
    given = read_classes(config.classes)
    if own and len(given) != len(own):
        raise UserError(f"words.classes: {len(given)} names for the {len(own)} classes of {split.source.location}")
    return given


def zero_shot(plan: WordsPlan, classes: Sequence[str], templates: Sequence[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and those of the teacher as `teacher_top1` and `teacher_top5` if they are cached.

    Raises:
        UserError: if no image has a label, or one has a label without a name.
    """
    weights = embed_classes(plan.tower, classes, make_templates(templates))
    found, labels = student_embeddings(plan)
    embedded, known = labelled(found, labels)
    if (largest := int(known.max())) >= len(classes):
        raise UserError(f"words.classes: {len(classes)} names, but an image has label {largest} (the first label is 0)")
    figures = accuracy(embedded @ weights.T, known)
    if (own := teacher_embeddings(plan)) is not None:
        scores = accuracy(labelled(own, labels)[0] @ weights.T, known)
        figures |= {f"teacher_{name}": score for name, score in scores.items()}
    return figures


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1` and `top5` in percent of scores [N, K] for labels [N]; `top5` counts all classes if there are fewer than 5."""
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = order == labels[:, None]
    return {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}
