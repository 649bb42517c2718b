"""Caches of synthetic images and features, of any size, for the other benchmarks."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA
from pipeline.storage.store import Store


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


def write_features(dataset: Dataset, model: str, codec: str, **settings: Any) -> CachedTeacher:
    """Features for every row of a dataset, from a normal distribution, in the shapes of a teacher with these settings."""
    config = TeacherConfig(model=model, weights="random", **settings)
    spec = make_teacher(config).spec
    teacher = CachedTeacher(config, spec, spec.name.replace("/", "-"), codec, "float32")
    generator = torch.Generator().manual_seed(0)
    drawn = {
        kind: codec.encode(torch.randn(16, *codec.shape, generator=generator))
        for kind, codec in teacher.codecs().items()
    }
    compression = "zstd" if Codec.parse(codec).zstd else "none"
    for record in dataset.images.records().values():
        table = dataset.images.read(record, ["sample_id", "view"])
        for kind, encoded in drawn.items():
            width = encoded.shape[1]
            column = binary_column(np.resize(encoded, (record.rows, width)))
            table = table.append_column(pa.field(kind, pa.binary(width), nullable=False), column)
        dataset.teacher(teacher.id).commit(record.shard, table, compression=compression)
    return teacher


def binary_column(rows: np.ndarray) -> pa.Array:
    """uint8 [n, bytes] as a column of fixed-size binary values, without a copy."""
    rows = np.ascontiguousarray(rows)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
