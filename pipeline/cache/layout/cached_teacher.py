"""A teacher in the cache: what it computes, how its features are stored, and what is known about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.part import teacher_home
from pipeline.cache.layout.projection import load_projections
from pipeline.cache.layout.shards import Figures, merge_figures, projection_in
from pipeline.cache.layout.shares import in_share
from pipeline.cache.layout.stats import Moments, load_moments
from pipeline.imaging.gpu_decode import Decoder
from pipeline.runtime.compiler_import import without_compiler
from pipeline.storage.store import Store, report_damage
from teachers.base import Teacher, TeacherError, TeacherSpec
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
        decoder: what decodes its images.
    """

    config: TeacherConfig
    spec: TeacherSpec
    id: str
    codec: str
    precision: str
    weights_sha256: str = ""
    decoder: Decoder = "cpu"

    @property
    def share(self) -> float:
        """Share of the images that it is asked about."""
        return self.config.share

    def asked(self, keys: pa.ChunkedArray) -> np.ndarray:
        """[N] bool: whether it is asked about the images with these keys."""
        return in_share(keys, self.share) if self.share < 1 else np.ones(len(keys), bool)

    def create(self) -> Teacher:
        """The teacher itself, without weights."""
        return make_teacher(self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image's features: ``summary`` (D_s,), unless the teacher has none, and ``patches`` (h, w, D)."""
        summary = {} if self.spec.summary_dim is None else {"summary": (self.spec.summary_dim,)}
        return {**summary, "patches": (*self.spec.grid, self.spec.patch_dim)}

    def codecs(self, projections: Mapping[str, Projection] | None = None) -> dict[str, FeatureCodec]:
        """The feature codec of every token type."""
        return Codec.parse(self.codec).build(self.shapes, projections)

    def row_bytes(self, projections: Mapping[str, Projection] | None = None) -> int:
        """Bytes of one view of an image in the cache; an upper bound if projections are still to be fitted."""
        return sum(codec.row_bytes for codec in self.codecs(projections).values())


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
    model = OWN_TEACHERS.get(config.model, config.model)
    try:
        with without_compiler():
            return create_teacher(model, **options)
    except (AttributeError, ImportError, TeacherError):
        return create_teacher(model, **options)  # which may need the compiler after all; if not, it says the same again


def projections_of(cache: Store, teacher: CachedTeacher) -> dict[str, Projection] | None:
    """The projections of a teacher's rows by token type, or None before they are fitted."""
    home = teacher_home(cache, teacher.id)
    name = projection_in(home)
    if not name:
        return None
    with report_damage(f"{home.uri}/{name}"):
        return load_projections(home.get(name))


def load_codecs(cache: Store, teacher: CachedTeacher) -> dict[str, FeatureCodec]:
    """Feature codecs of a teacher's shards by token type."""
    return teacher.codecs(projections_of(cache, teacher))


def teacher_stats(dataset: Dataset, teacher: CachedTeacher) -> dict[str, Moments]:
    """Statistics of a teacher over the samples of a dataset, by token type."""
    store = dataset.statistics(teacher.id)
    with report_damage(f"{store.uri}/stats.npz"):
        return load_moments(store.get("stats.npz"))


def teacher_fidelity(dataset: Dataset, teacher: CachedTeacher) -> Figures:
    """Fidelity of the stored features by token type, from the shards' records; see :func:`merge_figures`."""
    summaries = dataset.summaries(teacher.id)
    merged = merge_figures((summary.fidelity, summary.rows) for summary in summaries if summary.rows)
    return {kind: merged.get(kind, {}) for kind in teacher.shapes}
