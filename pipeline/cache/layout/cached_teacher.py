"""A teacher in the cache: what it computes, how its features are stored, and what is known about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection, load_projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardFolder
from pipeline.cache.layout.stats import Moments, load_moments
from pipeline.storage.store import report_damage
from teachers.base import Teacher, TeacherSpec
from teachers.registry import create_teacher

OWN_TEACHERS = {"student": "pipeline.student.teacher:student"}
"""Short names of teachers that this package provides; `teachers` does not know them."""


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher in the cache. Picklable.

    Attributes:
        id: its folder below a view.
        codec, precision: how its features are stored and computed.
        weights_sha256: digest of its weights; "" before they are needed, and for teachers without weights.
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image's features: ``summary`` (D_s,), unless the teacher has none, and ``patches`` (h, w, D)."""
        summary = {} if self.spec.summary_dim is None else {"summary": (self.spec.summary_dim,)}
        return {**summary, "patches": (*self.spec.grid, self.spec.patch_dim)}

    def codecs(self, projection: Projection | None = None) -> dict[str, FeatureCodec]:
        """The feature codec of every token type."""
        return Codec.parse(self.codec).build(self.shapes, projection)

    def row_bytes(self, projection: Projection | None = None) -> int:
        """Bytes of one view of an image in the cache; an upper bound if a projection is still to be fitted."""
        return sum(codec.row_bytes for codec in self.codecs(projection).values())


def teacher_labels(teachers: Sequence[CachedTeacher]) -> dict[str, str]:
    """A label for every teacher id: the readable name, or the id itself if two teachers share the name."""
    names = [teacher.spec.name for teacher in teachers]
    return {
        teacher.id: name if names.count(name) == 1 else teacher.id
        for teacher, name in zip(teachers, names, strict=True)
    }


def make_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that a configuration names, without weights; TeacherError if its settings do not fit it."""
    options = config.model_dump(include={"weights", "input_size", "pool", "args"})
    return create_teacher(OWN_TEACHERS.get(config.model, config.model), **options)


def projection_of(folder: ShardFolder) -> Projection | None:
    """The projection of the rows in a teacher's folder, or None."""
    name = folder.projection
    if not name:
        return None
    with report_damage(f"{folder.store.uri}/{name}"):
        return load_projection(folder.store.get(name))


def load_codecs(dataset: Dataset, teacher: CachedTeacher) -> dict[str, FeatureCodec]:
    """Feature codecs of a teacher's shards by token type."""
    return teacher.codecs(projection_of(dataset.teacher(teacher.id)))


def teacher_stats(dataset: Dataset, teacher: CachedTeacher) -> dict[str, Moments]:
    """Merged statistics of a teacher over a dataset, by token type."""
    store = dataset.teacher(teacher.id).store
    with report_damage(f"{store.uri}/stats.npz"):
        return load_moments(store.get("stats.npz"))


def teacher_fidelity(dataset: Dataset, teacher: CachedTeacher) -> dict[str, dict[str, float]]:
    """Fidelity of the stored features by token type: means over the shards, except for the lowest 1st percentile."""
    records = [record for record in dataset.records(dataset.teacher(teacher.id)).values() if record.rows]
    figures = {kind: [record.facts["fidelity"][kind] for record in records] for kind in teacher.shapes}
    return {
        kind: {
            name: min(part[name] for part in parts) if name == "cosine_p1" else fmean(part[name] for part in parts)
            for name in ("cosine", "cosine_p1", "relative_error")
        }
        for kind, parts in figures.items()
        if parts
    }
