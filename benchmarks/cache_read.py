"""Measure a training worker's reader against a plain scan of the same files, with several views in a step, and its memory.

    python benchmarks/cache_read.py
    python benchmarks/cache_read.py --views
    python benchmarks/cache_read.py --memory --images 50000

Writes a cache of random features of three teachers, in the shapes of DINOv2-S, CLIP and SAM, into a temporary folder, and reads
its files in four ways:

- plain scan: pyarrow's `read_row_group` of every row group of images and features, with the reader's columns and pyarrow's
  default threads; it copies every byte from the page cache into Arrow's memory;
- reader: `CacheReader.batches` with join by key, shuffle and collation into torch tensors, without decoding JPEGs, which
  every loader must do and which costs more than all the rest;
- the same with `FeatureCodec.decode` to float32, which training does on the device;
- the same with JPEGs decoded and resized.

Rounds are interleaved; each figure is the median over the rounds of the ratio within a round, so that other programs affect all
alike. "Bytes read" is what one epoch of a new reader reads, footers included, over the size of the files. Prints a table and
one line of JSON: the minimum `ratio` of the reader and the maximum of bytes read over the codecs.

`--views` measures what it gains to decode an image once for all of its views in a step: views per second of processor time of
all threads, for JPEGs of 448 px and four crops each at 224 px. `--memory` reads one teacher's features of many small images,
with JPEG decoding, and plots resident memory over time.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.memory import growth, report, watch_memory
from benchmarks.synthetic_cache import jpegs, read_photos, write_dataset, write_features
from pipeline.cache.fill.ingest import commit_crops
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardFolder
from pipeline.cache.read.reader import Batch, CacheReader, PartialBatch
from pipeline.imaging.geometry import ViewPolicy
from pipeline.storage.store import Store

TEACHERS: dict[str, dict[str, Any]] = {"dinov2/vits14": {}, "clip/ViT-B-16": {}, "sam/vit_b": {"pool": 4}}
"""Models and settings."""
SHARD_SIZE = 1024
PER_STEP = (1, 2, 4)
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "memory_read.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure speed, or what `--views` and `--memory` say."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        measure = _memory if options.memory else _views if options.views else _speed
        print(json.dumps(measure(folder, options)))


def _speed(folder: str, options: argparse.Namespace) -> dict[str, object]:
    print(
        f"{'codec':<10}{'KiB per row':>10}{'bare rows/s':>13}{'reader':>9}{'+ float32':>11}{'+ JPEG':>9}{'bytes read':>12}"
    )
    results = {codec: _codec_speed(f"{folder}/{codec}", codec, options) for codec in options.codecs}
    return {
        "ratio": min(row["ratio"] for row in results.values()),
        "bytes_read_ratio": max(row["bytes_read_ratio"] for row in results.values()),
        "codecs": results,
    }


def _codec_speed(folder: str, codec: str, options: argparse.Namespace) -> dict[str, float]:
    dataset = write_dataset(folder, options.images or 2048, jpegs(256), SHARD_SIZE)
    teachers = [write_features(dataset, model, codec, **settings) for model, settings in TEACHERS.items()]
    undecoded, full = (_reader(kind, dataset, teachers, options, 224) for kind in (UndecodedReader, CacheReader))
    codecs = {teacher.id: teacher.codecs() for teacher in teachers}
    ways: dict[str, Callable[[int], Iterator[int]]] = {
        "bare": lambda epoch: _bare_scan(dataset, teachers),
        "ratio": lambda epoch: (len(batch.keys) for batch in undecoded.batches(epoch)),
        "float32": lambda epoch: (_decode(batch, codecs) for batch in undecoded.batches(epoch)),
        "jpeg": lambda epoch: (_decode(batch, codecs) for batch in full.batches(epoch)),
    }
    rates = [{way: _rate(run(epoch)) for way, run in ways.items()} for epoch in range(options.rounds + 1)][1:]
    stored = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    read = _bytes_read(lambda: _reader(UndecodedReader, dataset, teachers, options, 224)) / stored
    ratios = {way: round(median(rate[way] / rate["bare"] for rate in rates), 3) for way in ways if way != "bare"}
    bare, row_kib = median(rate["bare"] for rate in rates), sum(teacher.row_bytes() for teacher in teachers) / 1024
    print(
        f"{codec:<10}{row_kib:>10.0f}{bare:>13,.0f}{ratios['ratio']:>9.2f}{ratios['float32']:>11.2f}"
        f"{ratios['jpeg']:>9.2f}{read:>12.4f}",
        flush=True,
    )
    return {**ratios, "bare_rows_per_second": round(bare), "bytes_read_ratio": round(read, 4)}


class UndecodedReader(CacheReader):
    """A reader that does not decode JPEGs."""

    def _decode_images(self, partial: PartialBatch) -> torch.Tensor:
        return torch.tensor([len(image.as_py()) for image in partial.images])


def _reader(
    kind: type[CacheReader], dataset: Dataset, teachers: Sequence[CachedTeacher], options: argparse.Namespace, side: int
) -> CacheReader:
    how = {"batch_size": options.batch_size, "window": options.window, "threads": options.threads}
    return kind(dataset, teachers, image_size=side, **how)


def _bare_scan(dataset: Dataset, teachers: Sequence[CachedTeacher]) -> Iterator[int]:
    """Read every row group of images and features; yields its number of rows."""
    (part,) = dataset.parts
    columns: dict[ShardFolder, list[str] | None] = {part.images: None}
    columns |= {part.teacher(teacher.id): ["key", "view", *teacher.shapes] for teacher in teachers}
    listed = {folder: folder.records() for folder in columns}
    for shard in range(part.shards):
        files = {folder: pq.ParquetFile(folder.store.open(listed[folder][shard].file)) for folder in columns}
        for group in range(files[part.images].num_row_groups):
            tables = [file.read_row_group(group, columns=columns[folder]) for folder, file in files.items()]
            yield tables[0].num_rows


def _decode(batch: Batch, codecs: dict[str, dict[str, FeatureCodec]]) -> int:
    for teacher, kinds in batch.features.items():
        for kind, rows in kinds.items():
            codecs[teacher][kind].decode(rows)
    return len(batch.keys)


def _rate(rows: Iterator[int], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    count = sum(rows)
    return count / (clock() - started)


def _bytes_read(make_reader: Callable[[], CacheReader]) -> int:
    """Bytes that a new reader reads from files in an epoch."""
    sizes: list[int] = []

    class CountedFile(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            data: bytes = super().read(size)
            sizes.append(len(data))
            return data

    counted = lambda store, path: pa.PythonFile(CountedFile(f"{store.uri}/{path}"), mode="r")  # noqa: E731
    with patch.object(Store, "open", counted):
        for _ in make_reader().batches(0):
            pass
    return sum(sizes)


def _views(folder: str, options: argparse.Namespace) -> dict[str, object]:
    images = read_photos(options.photos) if options.photos else jpegs(448)
    dataset = write_dataset(folder, options.images or 512, images, 256)
    dataset = replace(dataset, policy=ViewPolicy(crops=max(PER_STEP)))
    for part, shard in dataset.shards:
        commit_crops(part, shard)
    rates: dict[int, list[float]] = {views: [] for views in PER_STEP}
    for epoch in range(options.rounds):
        for views, measured in rates.items():
            how = {"batch_size": 64, "window": 512, "threads": options.threads, "per_step": views}
            batches = CacheReader(dataset, (), image_size=224, **how).batches(epoch)
            measured.append(_rate((len(batch.keys) for batch in batches), time.process_time))
    found = {views: median(measured) for views, measured in rates.items()}
    figures = {f"images_per_cpu_second_{views}": round(rate, 1) for views, rate in found.items()}
    gains = {f"gain_{views}": round(found[views] / found[1], 3) for views in PER_STEP[1:]}
    return {**figures, **gains, "threads": options.threads, "rounds": options.rounds}


def _memory(folder: str, options: argparse.Namespace) -> dict[str, object]:
    dataset = write_dataset(folder, options.images or 50000, jpegs(64), SHARD_SIZE)
    teacher = write_features(dataset, "dinov2/vits14", "int8")
    with watch_memory("reader") as curves:
        reader = _reader(CacheReader, dataset, [teacher], options, 64)
        codecs = {teacher.id: teacher.codecs()}
        images = sum(_decode(batch, codecs) for epoch in range(options.epochs) for batch in reader.batches(epoch))
    title = f"Reading {images:,} images, {teacher.row_bytes() / 1024:.0f} KiB of features each"
    means = report(curves, options.figure, title)
    return {"ratio": growth(means), "images": images, "resident_mib": means}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="2,048; 512 with --views, 50,000 with --memory")
    parser.add_argument("--codecs", nargs="+", default=["int8", "float16"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024, help="images shuffled together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", action="store_true", help="compare 1, 2 and 4 views of an image in a step instead")
    parser.add_argument(
        "--photos", type=Path, help="with --views: folder of JPEGs; default: synthetic images of 448 px"
    )
    parser.add_argument("--memory", action="store_true", help="watch memory instead")
    parser.add_argument("--epochs", type=int, default=1, help="with --memory: passes over the images")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="with --memory: PNG file of memory over time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
