"""A teacher as the cache knows it: what it gives, and how its features are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection, load_projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardFolder
from pipeline.storage.store import report_damage
from teachers.base import Teacher, TeacherSpec
from teachers.registry import create_teacher

OWN_TEACHERS = {"student": "pipeline.student.teacher:student"}
"""Short names of teachers that are made of this package, which `teachers` knows nothing of."""


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher as the cache knows it. Picklable.

    Attributes:
        config: how to make it.
        spec: what it gives.
        id: its folder below a view.
        codec, precision: how its features are computed and stored.
        weights_sha256: of its loaded weights; "" until they were needed, and for weight-free teachers.
    """

    config: TeacherConfig
    spec: TeacherSpec
    id: str
    codec: str
    precision: str
    weights_sha256: str = ""

    def create(self) -> Teacher:
        """The teacher itself, without weights."""
        return make_teacher(self.config)

    @property
    def summary_shape(self) -> tuple[int, ...] | None:
        """(D_s,) or None."""
        return None if self.spec.summary_dim is None else (self.spec.summary_dim,)

    @property
    def patches_shape(self) -> tuple[int, ...]:
        """(h, w, D)."""
        return (*self.spec.grid, self.spec.patch_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image's features by column (``summary``, ``patches``)."""
        summary = {} if self.summary_shape is None else {"summary": self.summary_shape}
        return {**summary, "patches": self.patches_shape}

    def codecs(self, projection: Projection | None = None) -> dict[str, FeatureCodec]:
        """Encoder and decoder of every token type."""
        return Codec.parse(self.codec).build(self.shapes, projection)

    def row_bytes(self, projection: Projection | None = None) -> int:
        """Bytes that one view of an image takes in the cache; without the projection that is to be fitted, at most."""
        return sum(codec.row_bytes for codec in self.codecs(projection).values())


def teacher_labels(teachers: Sequence[CachedTeacher]) -> dict[str, str]:
    """A label for every teacher id: its readable name, or the id itself where two teachers share the name."""
    names = [teacher.spec.name for teacher in teachers]
    return {
        teacher.id: teacher.spec.name if names.count(teacher.spec.name) == 1 else teacher.id for teacher in teachers
    }


def make_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that a configuration names, without weights.

    Raises:
        TeacherError: where there is no such teacher or it cannot be made as asked.
    """
    options = config.model_dump(include={"weights", "input_size", "pool", "args"})
    return create_teacher(OWN_TEACHERS.get(config.model, config.model), **options)


def projection_of(folder: ShardFolder) -> Projection | None:
    """What the rows of a teacher's folder are projected on, or None."""
    name = folder.projection
    if not name:
        return None
    with report_damage(f"{folder.store.uri}/{name}"):
        return load_projection(folder.store.get(name))


def load_codecs(dataset: Dataset, teacher: CachedTeacher) -> dict[str, FeatureCodec]:
    """Decoders of a teacher's shards by token type."""
    return teacher.codecs(projection_of(dataset.teacher(teacher.id)))
