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
from pipeline.cache.layout.dataset import BAD_SCHEMA, SAMPLE_SCHEMA, Dataset, make_dataset
from pipeline.cache.layout.dataset import write_dataset as write_version
from pipeline.cache.layout.part import PART_SCHEMA, Part, image_key, part_id, write_part
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA, complete_record, view_row
from pipeline.imaging.geometry import FULL
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
    """A data set of one part, whose `count` rows repeat these images under keys of their own."""
    keys = [image_key(str(number).encode()) for number in range(count)]
    sizes = [len(images[number % len(images)]) for number in range(count)]
    index = pa.table({"key": keys, "size": sizes}, schema=PART_SCHEMA)
    part = Part(Store.at(folder), part_id(index), count, shard_size)
    write_part(part, index)
    for shard in range(part.shards):
        numbers = range(shard * shard_size, shard * shard_size + part.shard_rows(shard))
        rows = [{**view_row(keys[number], 0, FULL), "image": images[number % len(images)]} for number in numbers]
        part.images.commit(shard, pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA))
    zeros, numbers = [0] * count, range(count)
    columns = {
        "sample_id": [f"{number:09d}.jpg" for number in numbers],
        "label": zeros,
        "uri": [""] * count,
        "offset": numbers,
        "size": sizes,
        "version": zeros,
        "key": keys,
        "row": numbers,
    }
    samples, empty = pa.table(columns, schema=SAMPLE_SCHEMA), Dataset(part.cache, "made-up", "made-up", ())
    return write_version(make_dataset(empty, [part], {part.id: samples}, BAD_SCHEMA.empty_table()))


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
    for part, shard in dataset.shards:
        table = part.images.read(complete_record(part.images, shard), ["key", "view"])
        for kind, encoded in drawn.items():
            width = encoded.shape[1]
            rows = pa.py_buffer(np.resize(encoded, (table.num_rows, width)))
            column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), table.num_rows, [None, rows])
            table = table.append_column(pa.field(kind, pa.binary(width), nullable=False), column)
        part.teacher(teacher.id).commit(shard, table, compression=compression)
    return teacher
