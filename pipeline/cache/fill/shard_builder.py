"""One teacher's shard: encoded features, their statistics and their fidelity, until it is committed."""

import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import Codec, Projection
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.cache.layout.shares import spread
from pipeline.cache.layout.stats import Moments, MomentSums
from pipeline.cache.layout.target import fidelity
from pipeline.cache.layout.view_rows import ViewRows
from teachers.base import TeacherError, TeacherOutput

FIDELITY_ROWS = 32
"""Rows of a shard on which the fidelity of its codec is measured."""
FEWEST_VECTORS = 32
"""Fewer vectors have no statistics to standardise them by: their fidelity is not measured."""
LOST = 0.5
"""A mean cosine of the standardised target below which a codec is refused: nothing to train on is left."""


class ShardBuilder:
    """Collects the encoded features of one teacher and shard, with their statistics."""

    def __init__(
        self, teacher: CachedTeacher, projection_name: str, projections: Mapping[str, Projection] | None
    ) -> None:
        self.teacher = teacher
        self.projection_name = projection_name
        self.codecs = teacher.codecs(projections)
        self.encoded: dict[str, list[np.ndarray]] = {kind: [] for kind in teacher.shapes}
        self.sums = {kind: MomentSums() for kind in teacher.shapes}
        self.seconds = 0.0
        self.sample: dict[str, tuple[Tensor, np.ndarray]] = {}
        self.sample_held_out = False

    def add(self, output: TeacherOutput, seconds: float, held_out: bool = True) -> None:
        """Add the features of the next batch, on any device, and the seconds that the device took for them.

        Args:
            held_out: whether no projection was fitted on them; fidelity is measured on such features if there are any.

        Raises:
            TeacherError: if they are not finite, or too large for the codec.
        """
        self.seconds += seconds
        sampled = not self.sample or (held_out and not self.sample_held_out)
        self.sample_held_out |= held_out
        for kind in self.encoded:
            features: Tensor = getattr(output, kind)
            codec = self.codecs[kind].to(features.device)
            try:
                rows = codec.encode(features)
            except ValueError as error:
                raise TeacherError(f"teacher {self.teacher.spec.name} computed {kind} {error}") from error
            self.encoded[kind].append(rows)
            self.sums[kind].add(features)
            if sampled:  # a copy: a view would keep the whole batch alive
                self.sample[kind] = features[:FIDELITY_ROWS].clone(), rows[:FIDELITY_ROWS]

    def fidelity(self, moments: Mapping[str, Moments]) -> dict[str, dict[str, float]]:
        """Figures of `pipeline.cache.layout.target.fidelity` by token type, given the statistics of the shard.

        Raises:
            TeacherError: if nothing is left of the target.
        """
        found = {}
        for kind, (features, rows) in self.sample.items():
            kept = self.codecs[kind].decode(torch.from_numpy(rows).to(features.device))
            part = moments[kind]
            statistics = [torch.from_numpy(values).to(features.device) for values in (part.mean, part.std)]
            found[kind] = fidelity(features, kept, *statistics)
            if part.count < FEWEST_VECTORS:
                found[kind] = {"relative_error": found[kind]["relative_error"]}
            if found[kind].get("target_cosine", 1.0) < LOST:
                raise TeacherError(
                    f"teacher {self.teacher.spec.name}: {self.teacher.codec} keeps a cosine of only "
                    f"{found[kind]['target_cosine']:.2f} of the standardised {kind}, which a student is trained on: "
                    "set cache.codec=pca-int8-zstd"
                )
        return found

    def commit(self, folder: ShardFolder, shard: int, views: ViewRows, device: str) -> ShardRecord:
        """Write the shard of features of these views, which are null where the teacher is not asked."""
        table, asked = views.rows.select(["key", "view"]), self.teacher.asked(views.rows["key"])
        whole = self.teacher.share == 1
        for kind, parts in self.encoded.items():
            width = self.codecs[kind].row_bytes
            rows = np.concatenate(parts) if parts else np.empty((0, width), np.uint8)
            column = (
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
                if whole
                else spread(rows, asked)
            )
            table = table.append_column(pa.field(kind, column.type, nullable=not whole), column)
        moments = {kind: sums.moments() for kind, sums in self.sums.items() if sums.count}
        facts = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "device_seconds": round(self.seconds, 3),
            "fidelity": self.fidelity(moments),
            "torch": torch.__version__,
            **views.files,
        }
        metadata = {"teacher": self.teacher.id, "codec": self.teacher.codec, "projection": self.projection_name}
        metadata |= {f"{kind}.shape": json.dumps(shape) for kind, shape in self.teacher.shapes.items()}
        return folder.commit(
            shard,
            table.replace_schema_metadata(metadata),
            moments,
            facts,
            projection=self.projection_name,
            compression="zstd" if Codec.parse(self.teacher.codec).zstd else "none",
        )
