"""One teacher's shard: encoded features, their statistics and their fidelity, until it is committed."""

import json

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import Codec, Projection
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.cache.layout.stats import MomentSums
from pipeline.cache.layout.view_rows import ViewRows
from teachers.base import TeacherError, TeacherOutput

FIDELITY_IMAGES = 32
"""Images of a shard on which the fidelity of its codec is measured."""


class ShardBuilder:
    """Collects the encoded features of one teacher and shard, with their statistics."""

    def __init__(self, teacher: CachedTeacher, projection_name: str, projection: Projection | None) -> None:
        self.teacher = teacher
        self.projection_name = projection_name
        self.codecs = teacher.codecs(projection)
        self.encoded: dict[str, list[np.ndarray]] = {kind: [] for kind in teacher.shapes}
        self.sums = {kind: MomentSums() for kind in teacher.shapes}
        self.seconds = 0.0
        self.fidelity: dict[str, dict[str, float]] = {}

    def add(self, output: TeacherOutput, seconds: float) -> None:
        """Add the features of the next batch, on any device, and the seconds that the device took for them.

        Raises:
            TeacherError: if they are not finite, or too large for the codec.
        """
        self.seconds += seconds
        for kind in self.encoded:
            features: Tensor = getattr(output, kind)
            codec = self.codecs[kind].to(features.device)
            try:
                rows = codec.encode(features)
            except ValueError as error:
                raise TeacherError(f"teacher {self.teacher.spec.name} computed {kind} {error}") from error
            self.encoded[kind].append(rows)
            self.sums[kind].add(features)
            if kind not in self.fidelity:
                self.fidelity[kind] = codec.fidelity(features[:FIDELITY_IMAGES], rows[:FIDELITY_IMAGES])

    def commit(self, folder: ShardFolder, shard: int, views: ViewRows, device: str) -> ShardRecord:
        """Write the shard of features of these views."""
        table = views.rows.select(["sample_id", "view"])
        for kind, parts in self.encoded.items():
            width = self.codecs[kind].row_bytes
            rows = np.concatenate(parts) if parts else np.empty((0, width), np.uint8)
            column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
            table = table.append_column(pa.field(kind, column.type, nullable=False), column)
        facts = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "device_seconds": round(self.seconds, 3),
            "fidelity": self.fidelity,
            "torch": torch.__version__,
            **views.files,
        }
        metadata = {"teacher": self.teacher.id, "codec": self.teacher.codec, "projection": self.projection_name}
        metadata |= {f"{kind}.shape": json.dumps(shape) for kind, shape in self.teacher.shapes.items()}
        return folder.commit(
            shard,
            table.replace_schema_metadata(metadata),
            {kind: sums.moments() for kind, sums in self.sums.items() if sums.count},
            facts,
            projection=self.projection_name,
            compression="zstd" if Codec.parse(self.teacher.codec).zstd else "none",
        )
