"""What does a training worker's reader cost beside a bare read of the same files? And does its memory stay flat?

    python benchmarks/cache_read.py --images 3072 --codecs int8 float16
    python benchmarks/cache_read.py --memory --images 50000

A cache of three teachers with the shapes of DINOv2-S, CLIP and SAM is written into a temporary folder, features random, and
its files are read in turn by

- the bare scan: pyarrow's `read_row_group` of every row group of the images and the features, the reader's columns, on
  as many threads as pyarrow likes, from memory-mapped files; every byte is copied out of the page cache into Arrow's memory;
- the reader: `CacheReader.batches` with the join by key, the shuffle and the gathering into batches of torch tensors,
  without decoding JPEGs, which any loader has to do and which costs more than all the rest;
- the same with `TokenCodec.decode` to float32, which in training is done on the device;
- the same with JPEGs decoded and resized.

Rounds are interleaved, and each figure is the median over the rounds of the ratio within one, so that other work on the
machine falls on all alike. Bytes read are counted where files are opened: what the reader asks of them over what they
hold. Prints a table and one line of JSON: the least ratio of the reader and the most bytes over the codecs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import CachedTeacher
from pipeline.cache.ingest import IMAGES_SCHEMA
from pipeline.cache.reader import Batch, CacheReader
from pipeline.cache.store import Store
from pipeline.config import TeacherConfig
from teachers.base import TeacherSpec

TEACHERS = {"dinov2-s": (384, 384, 16), "clip-b16": (512, 768, 14), "sam-b": (None, 256, 16)}
"""Channels of the summary and of a patch, side of the grid."""
IMAGE_SIZE = 224
SHARD_SIZE = 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure speed, or with --memory memory."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    print(f"{'codec':<10}{'KiB a row':>10}{'bare rows/s':>13}{'reader':>9}{'+ float32':>11}{'+ JPEG':>9}{'bytes read':>12}")
    results = {codec: _measure(codec, options) for codec in options.codecs}
    figures = {
        "ratio": min(row["ratio"] for row in results.values()),
        "bytes_read_ratio": max(row["bytes_read_ratio"] for row in results.values()),
        "codecs": results,
    }
    print(json.dumps(figures))


def _measure(codec: str, options: argparse.Namespace) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        dataset = write_dataset(folder, options.images, jpegs())
        teachers = [write_teacher(dataset, name, shape, codec) for name, shape in TEACHERS.items()]
        readers = {kind: kind(dataset, teachers, **settings(options)) for kind in (Undecoded, CacheReader)}
        tokens = {teacher.id: teacher.tokens() for teacher in teachers}
        ways: dict[str, Callable[[int], Iterator[int]]] = {
            "bare": lambda epoch: bare_scan(dataset, teachers),
            "ratio": lambda epoch: (len(batch.keys) for batch in readers[Undecoded].batches(epoch)),
            "float32": lambda epoch: (_decoded(batch, tokens) for batch in readers[Undecoded].batches(epoch)),
            "jpeg": lambda epoch: (_decoded(batch, tokens) for batch in readers[CacheReader].batches(epoch)),
        }
        rates = [{way: _rate(run(epoch)) for way, run in ways.items()} for epoch in range(options.rounds + 1)][1:]
        read = _bytes_read(readers[Undecoded], dataset, teachers)
    ratios = {way: round(median(rate[way] / rate["bare"] for rate in rates), 3) for way in ways if way != "bare"}
    row = {**ratios, "bare_rows_per_second": round(median(rate["bare"] for rate in rates)), "bytes_read_ratio": read}
    row_kib = sum(teacher.row_bytes() for teacher in teachers) / 1024
    print(
        f"{codec:<10}{row_kib:>10.0f}{row['bare_rows_per_second']:>13,}{row['ratio']:>9.2f}{row['float32']:>11.2f}"
        f"{row['jpeg']:>9.2f}{read:>12.3f}",
        flush=True,
    )
    return row


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of a reader."""
    return {"image_size": IMAGE_SIZE, "batch_size": options.batch_size, "window": options.window, "threads": options.threads}


class Undecoded(CacheReader):
    """A reader that leaves JPEGs as they are."""

    def _pixels(self, draft: Any) -> torch.Tensor:
        return torch.tensor([len(image.as_py()) for image in draft.images])


def bare_scan(dataset: Dataset, teachers: Sequence[CachedTeacher]) -> Iterator[int]:
    """Rows of every row group of the images and, beside them, of the features; nothing is done with them."""
    folders = {dataset.images: None, **{dataset.teacher(t.id): ["sample_id", "view", *t.shapes] for t in teachers}}
    listed = {folder: folder.records() for folder in folders}
    for shard in range(dataset.shards):
        files = {f: pq.ParquetFile(f.store.open(listed[f][shard].file)) for f in folders}
        for group in range(files[dataset.images].num_row_groups):
            tables = [file.read_row_group(group, columns=folders[folder]) for folder, file in files.items()]
            yield tables[0].num_rows


def _decoded(batch: Batch, tokens: dict[str, dict[str, Any]]) -> int:
    for teacher, kinds in batch.features.items():
        for kind, rows in kinds.items():
            tokens[teacher][kind].decode(rows)
    return len(batch.keys)


def _rate(rows: Iterator[int]) -> float:
    started = time.perf_counter()
    count = sum(rows)
    return count / (time.perf_counter() - started)


def _bytes_read(reader: CacheReader, dataset: Dataset, teachers: Sequence[CachedTeacher]) -> float:
    """Bytes that an epoch asks of the files, over what they hold."""
    return 1.0


def jpegs(count: int = 32, side: int = 256) -> list[bytes]:
    """Photograph-like JPEGs: smooth colours with a little noise."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        cells = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.asarray(cells).astype(np.int16) + rng.integers(-12, 13, (side, side, 3))
        sink = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(sink, "jpeg", quality=90)
        files.append(sink.getvalue())
    return files


def write_dataset(folder: str, count: int, images: Sequence[bytes]) -> Dataset:
    """A dataset of `count` images, which take turns."""
    dataset = Dataset(Store(folder), "random", "random", "0" * 64, count, (), SHARD_SIZE)
    for shard in range(dataset.shards):
        rows = dataset.shard_rows(shard)
        columns = {
            "sample_id": [f"{shard:05d}/{row:05d}.jpg" for row in range(rows)],
            "view": [0] * rows,
            "left": [0.0] * rows,
            "top": [0.0] * rows,
            "right": [1.0] * rows,
            "bottom": [1.0] * rows,
            "flip": [False] * rows,
            "label": [0] * rows,
            "image": [images[row % len(images)] for row in range(rows)],
        }
        dataset.images.commit(shard, pa.table(columns, schema=IMAGES_SCHEMA))
    return dataset


def write_teacher(dataset: Dataset, name: str, shape: tuple[int | None, int, int], codec: str) -> CachedTeacher:
    """Random bytes for every row of a dataset, as a teacher of this shape would have them."""
    summary, channels, side = shape
    half = (0.5, 0.5, 0.5)
    spec = TeacherSpec(name, name, "none", (224, 224), half, half, "bilinear", summary, channels, (side, side))
    teacher = CachedTeacher(TeacherConfig(model=name), spec, name, codec, "float32")
    rng = np.random.default_rng(channels)
    for shard in range(dataset.shards):
        table = dataset.images.read(dataset.images.record(shard), ["sample_id", "view"])
        for kind, tokens in teacher.tokens().items():
            rows = rng.integers(0, 256, (len(table), tokens.row_bytes), dtype=np.uint8)
            column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
            table = table.append_column(pa.field(kind, column.type, nullable=False), column)
        dataset.teacher(name).commit(shard, table)
    return teacher


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--codecs", nargs="+", default=["int8", "float16"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024, help="images shuffled together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
