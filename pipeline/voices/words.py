"""Words: a student that CLIP has taught classifies by class names, and finds images by a text or by an image.

    from pipeline.voices.words import load_words

    words = load_words("work/runs/<run>/student", text_weights="ViT-B-16.pt")
    words.classify("photos", ["a cat", "a dog"])
    words.find("photos", "a red car")

The head predicts CLIP's image embedding, after the projection, in CLIP's own scale; the text tower is the teacher's own.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.predict.images import Images, One, list_images
from pipeline.predict.predictor import Predictor
from pipeline.student.loading import LoadedStudent
from pipeline.voices.heads import KeptTeacher, Summaries, find_teacher, open_student, out_channels
from pipeline.voices.texts import AS_WRITTEN, check_classes, embed_classes, make_templates
from teachers.clip_text import TextTower, load_text_tower
from teachers.weights import parse_weights

log = logging.getLogger(__name__)

KIND = "CLIP (clip/ViT-B-16@openai)"


class Found(NamedTuple):
    """An image that a search found, and the cosine of its embedding to the query's."""

    image: One
    cosine: float


class Words:
    """A student with the head of a CLIP teacher, on a device; the text tower is loaded when a text is first embedded.

    Args:
        model: gives embeddings in the scale and space of the text tower.
        tower: loads the text tower.
        name: of the student, for messages.
        input_size, device, batch_size: as in :class:`~pipeline.predict.predictor.Predictor`.
    """

    def __init__(
        self,
        model: Summaries,
        tower: Callable[[], TextTower],
        name: str,
        input_size: int,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model, self._load_tower = model, tower
        self.predictor = Predictor(model, name, input_size, device, batch_size)

    @cached_property
    def tower(self) -> TextTower:
        """The text tower; UserError if its embeddings have another width than the head's."""
        tower = self._load_tower()
        if tower.dim != self.model.dim:
            raise UserError(
                f"{self.predictor.name}: its head gives {self.model.dim} channels, the text tower of {tower.name} {tower.dim}: "
                "name the CLIP model that taught it"
            )
        return tower.to(self.predictor.device)

    def embed(self, images: Images) -> Tensor:
        """Embeddings [N, D] of length 1 of the readable images, on the CPU; raises as :meth:`Predictor.features`."""
        return F.normalize(self.predictor.features(images), dim=1)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str] = AS_WRITTEN) -> Tensor:
        """Embeddings [K, D] of length 1 of classes, averaged over templates (:func:`~pipeline.voices.texts.make_templates`)."""
        check_classes(classes)
        return embed_classes(self.tower, classes, make_templates(templates))

    def logits(self, images: Tensor, classes: Tensor) -> Tensor:
        """Logits [N, K] of image embeddings [N, D] and class embeddings [K, D], as open_clip's `get_logits`."""
        return self.tower.logit_scale * images @ classes.T + self.tower.logit_bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of logits [N, K]: over the classes, or where the tower was trained by the sigmoid loss, of each class by itself."""
        return logits.sigmoid() if self.tower.sigmoid else logits.softmax(dim=1)

    def classify(
        self, images: Images, classes: Sequence[str], templates: Sequence[str] = AS_WRITTEN, top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Names and probabilities of the `top` likeliest classes of every image, best first.

        Args:
            classes: texts; with templates, names that the templates are filled with.
            templates: `openai`, `simple`, or texts with `{}`.

        Raises:
            UserError: for classes or templates that cannot be used, or naming an unreadable image.
            TeacherError: if the text tower cannot be loaded.
        """
        embedded = self.embed_classes(classes, templates)
        probabilities = self.probabilities(self.logits(self.embed(images), embedded))
        shares, order = probabilities.topk(min(top, len(classes)), dim=1)
        rows = zip(order.tolist(), shares.tolist(), strict=True)
        return [[(classes[number], share) for number, share in zip(*row, strict=True)] for row in rows]

    def find(self, images: Images, text: str, top: int = 10) -> list[Found]:
        """The images that are most like a text, best first; raises as :meth:`classify`."""
        return self._search(images, self.tower.embed([text]), top)

    def similar(self, images: Images, query: Images, top: int = 10) -> list[Found]:
        """The images that are most like an image, best first; needs no text tower. UserError unless `query` is one image."""
        queries = self.embed(query)
        if len(queries) != 1:
            raise UserError(f"the query must be one image, not {len(queries)}")
        return self._search(images, queries, top)

    def _search(self, images: Images, query: Tensor, top: int) -> list[Found]:
        listed = list_images(images)
        embedded = self.embed(listed)
        skipped = self.predictor.unreadable or {}
        readable = [image for image in listed if not (isinstance(image, Path) and image in skipped)]
        cosines, order = (embedded @ query[0]).topk(min(top, len(readable)))
        return [Found(readable[n], cosine) for n, cosine in zip(order.tolist(), cosines.tolist(), strict=True)]


def load_words(
    student: str,
    *,
    teacher: str | None = None,
    text_weights: str | None = None,
    input_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
    tracking_uri: str = "",
) -> Words:
    """A student with the head of a CLIP teacher.

    Args:
        student: exported folder, address or MLflow URI, distilled with a CLIP teacher and `student.keep_heads=true`.
        teacher: label of the CLIP teacher, if the student has several.
        text_weights: of the text tower: `pretrained`, a checkpoint file, or `random[:seed]`; None: the teacher's published ones.
        input_size: in pixels; None: as the student was trained.
        device, batch_size: as in :class:`~pipeline.predict.predictor.Predictor`.
        tracking_uri: MLflow store in which a URI is looked up.

    Raises:
        UserError: if the student has no such head, or the weights of the text tower must be named.
    """
    loaded = open_student(student, tracking_uri)
    model, kept = find_summaries(loaded, teacher)
    size = input_size or loaded.input_size or 224
    return Words(model, lambda: open_tower(kept, text_weights), student, size, device, batch_size)


def find_summaries(student: LoadedStudent, teacher: str | None = None) -> tuple[Summaries, KeptTeacher]:
    """A student that predicts the image embedding of its CLIP teacher; raises as :func:`load_words`."""
    whole, kept = find_teacher(student, is_clip, KIND, teacher)
    if not is_clip(kept.name):
        raise UserError(
            f"teacher {kept.label}: is not a CLIP teacher (clip/<model>): its summary is not in the space of any text tower. "
            "timm's CLIP models give tokens before the projection"
        )
    head = kept.heads["summary"]
    model = Summaries(whole.student.encoder, head, kept.standardisers["summary"], out_channels(head))
    return model.eval(), kept


def open_tower(teacher: KeptTeacher, weights: str | None) -> TextTower:
    """The text tower of a CLIP teacher; `weights` as `text_weights` of :func:`load_words`, which names the errors."""
    if weights is None:
        if not teacher.weights.startswith("hub:"):
            known = teacher.weights.partition(":")[0] or "unknown"
            raise UserError(
                f"text_weights must be given: the image tower of {teacher.name} had its weights from: {known}. Name the "
                "checkpoint file with both towers, or `pretrained`"
            )
        weights = "pretrained"
    source = parse_weights(weights, teacher.name, teacher.name.partition("@")[2])
    if source.kind == teacher.weights.partition(":")[0] == "file" and source.identity != teacher.weights:
        log.warning(
            "text_weights: %s is not the file that the image tower of %s was read from: are both of one model?",
            weights,
            teacher.name,
        )
    return load_text_tower(teacher.name, weights)


def is_clip(name: str) -> bool:
    """Whether a teacher of this name is a CLIP model, whose summary is its projected image embedding."""
    return name.startswith("clip/")
