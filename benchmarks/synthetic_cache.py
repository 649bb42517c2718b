"""Caches of synthetic images and features, of any size, for the other benchmarks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardRecord
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA
from pipeline.storage.store import Store
from teachers.base import TeacherSpec


def read_photos(folder: Path) -> list[bytes]:
    """The JPEG files below a folder, sorted by path."""
    return [path.read_bytes() for path in sorted(folder.rglob("*.[jJ][pP]*[gG]"))]


def jpegs(side: int, count: int = 32) -> list[bytes]:
    """JPEGs of smooth colours with a little noise; their bytes are those of photographs of this side in pixels."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        cells = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "jpeg", quality=90)
        files.append(sink.getvalue())
    return files


def write_dataset(folder: str, count: int, images: Sequence[bytes], shard_size: int) -> Dataset:
    """A dataset of `count` rows that repeat these images."""
    dataset = Dataset(Store.at(folder), "made-up", "made-up", "0" * 64, count, (), shard_size)
    for shard in range(dataset.shards):
        rows = dataset.shard_rows(shard)
        boxes = {"left": [0.0] * rows, "top": [0.0] * rows, "right": [1.0] * rows, "bottom": [1.0] * rows}
        columns = {
            "sample_id": [f"{shard:05d}/{row:05d}.jpg" for row in range(rows)],
            "view": [0] * rows,
            **boxes,
            "flip": [False] * rows,
            "label": [0] * rows,
            "image": [images[row % len(images)] for row in range(rows)],
        }
        dataset.images.commit(shard, pa.table(columns, schema=IMAGES_SCHEMA))
    return dataset


def write_teacher(
    dataset: Dataset, name: str, summary: int | None, patches: int, side: int, codec: str
) -> CachedTeacher:
    """Features of random bytes for every row of a dataset, in the shapes of a teacher of these channels and grid side."""
    half = (0.5, 0.5, 0.5)
    spec = TeacherSpec(name, name, "none", (224, 224), half, half, "bilinear", summary, patches, (side, side))
    teacher = CachedTeacher(TeacherConfig(model=name), spec, name, codec, "float32")
    rng = np.random.default_rng(patches)
    widths = {kind: codec.row_bytes for kind, codec in teacher.codecs().items()}
    for record in dataset.images.records().values():
        rows = {kind: rng.integers(0, 256, (record.rows, width), dtype=np.uint8) for kind, width in widths.items()}
        commit_features(dataset, name, record, rows)
    return teacher


def commit_features(
    dataset: Dataset, teacher: str, record: ShardRecord, rows: Mapping[str, np.ndarray], compression: str = "none"
) -> None:
    """Commit a shard of encoded features, uint8 [rows, bytes] by kind, for the rows of a shard of images."""
    table = dataset.images.read(record, ["sample_id", "view"])
    for kind, encoded in rows.items():
        table = table.append_column(pa.field(kind, pa.binary(encoded.shape[1]), nullable=False), binary_column(encoded))
    dataset.teacher(teacher).commit(record.shard, table, compression=compression)


def binary_column(rows: np.ndarray) -> pa.Array:
    """uint8 [n, bytes] as a column of fixed-size binary values, without a copy."""
    rows = np.ascontiguousarray(rows)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
