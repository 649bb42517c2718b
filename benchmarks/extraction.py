"""How much of a teacher's own rate is left in the extraction? And does its memory stay flat?

    python benchmarks/extraction.py --teacher dinov2/vits14 --images 256
    python benchmarks/extraction.py --device cuda --teacher dinov2/vitb14 --precision bfloat16 --batch-size 256 --images 8192
    python benchmarks/extraction.py --memory --images 50000

Stages alone, on the same images and threads: `teacher`, the bare forward over batches that are rendered already and lie in
host memory; `render`, JPEG decode and resize. Then `Extract` over whole shards, two at once as in its actor: it reads images,
renders, asks the teacher, encodes, takes statistics and commits. `--ray` adds `extract_shards` on an embedded Ray, less what
it takes to start there (the same with the first image shard alone, done before). Rounds are interleaved, and `ratio` is
the median over the rounds of the rate of `Extract` over that of its slowest stage. Weights are random unless
`--weights` names a file; the projection of `pca` is fitted beforehand. Prints a table and one line of JSON.
Neither Ray nor MLflow is needed without `--ray` and `--memory`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.made_up_cache import jpegs, write_dataset
from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import CachedTeacher, Extract, make_teacher
from pipeline.cache.keys import teacher_id
from pipeline.cache.spine import ROWS_SCHEMA
from pipeline.config import TeacherConfig

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "memory_extract.png"
SHARDS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure speed, or with --memory memory."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        figures = _memory(options, folder) if options.memory else _speed(options, folder)
    print(json.dumps(figures))


def _speed(options: argparse.Namespace, folder: str) -> dict[str, object]:
    photos = sorted(options.photos.rglob("*.[jJ][pP]*[gG]")) if options.photos else []
    images = [photo.read_bytes() for photo in photos] or jpegs(256)
    dataset = write_dataset(folder, options.images, images, -(-options.images // SHARDS))
    teacher = _teacher(options)
    extract = Extract({"train": dataset}, [teacher], options.device, options.threads, options.batch_size)
    stages = _Stages(dataset, teacher, extract)
    ways: dict[str, Callable[[], None]] = {"teacher": stages.forward, "render": stages.render, "extract": stages.extract}
    stages.extract()
    rounds = [{way: _rate(run, options.images) for way, run in ways.items()} for _ in range(options.rounds)]
    rates = {way: round(median(rates[way] for rates in rounds), 1) for way in ways}
    slowest = min(("teacher", "render"), key=rates.__getitem__)
    print(f"{'stage':<10}{'images/s':>10}")
    print("\n".join(f"{way:<10}{rate:>10,.1f}" for way, rate in rates.items()), flush=True)
    ratio = median(rates["extract"] / rates[slowest] for rates in rounds)
    figures = {"ratio": round(ratio, 3), "slowest": slowest, "images_per_second": rates}
    if options.ray:
        figures["ray_ratio"] = round(stages.ray_rate(options.batch_size) / rates[slowest], 3)
    return {**figures, "teacher": options.teacher, "device": options.device, "precision": options.precision}


def _teacher(options: argparse.Namespace) -> CachedTeacher:
    config = TeacherConfig(model=options.teacher, weights=options.weights, args=json.loads(options.args))
    teacher = make_teacher(config)
    teacher.load()
    name = teacher_id(teacher.spec, options.codec, options.precision)
    return CachedTeacher(config, teacher.spec, name, options.codec, options.precision, teacher.weights_sha256)


class _Stages:
    """What is measured, on the shards of one dataset."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher, extract: Extract) -> None:
        self.dataset, self.teacher, self.extractor = dataset, teacher, extract
        self.pixels = list(self._rendered())

    def _rendered(self):
        for record in self.dataset.images.records().values():
            images = self.dataset.images.read(record)
            rows = images.select(ROWS_SCHEMA.names)
            for batch in self.extractor._rendered(images, rows, [self.teacher.id]):
                yield batch[self.teacher.id]

    def forward(self) -> None:
        """The teacher over rendered batches."""
        for pixels in self.pixels:
            self.extractor.teachers[self.teacher.id].encode(pixels)
        if self.extractor.device == "cuda":
            torch.cuda.synchronize()

    def render(self) -> None:
        """Reading, decoding and resizing."""
        for _ in self._rendered():
            pass

    def extract(self) -> None:
        """Everything, two shards at once."""
        self._forget()
        with ThreadPoolExecutor(2) as pool:
            for row in pool.map(self.extractor, self._rows()):
                assert row["computed"] == 1, row

    def ray_rate(self, batch_size: int) -> float:
        """Images a second of the Ray pipeline, from its first shard's end to that of the last."""
        from pipeline.cache.ray_pipeline import extract_shards
        from pipeline.ray_session import connect

        self._forget()
        with connect():
            ends = [time.perf_counter() for _ in extract_shards(self._rows(), ({"train": self.dataset}, [self.teacher]), batch_size)]
        return (self.dataset.count - self.dataset.shard_rows(0)) / (ends[-1] - ends[0])

    def _rows(self) -> list[dict[str, object]]:
        return [{"split": "train", "shard": shard} for shard in range(self.dataset.shards)]

    def _forget(self) -> None:
        for shard in range(self.dataset.shards):
            self.dataset.teacher(self.teacher.id).unlist(shard)


def _rate(run: Callable[[], None], images: int) -> float:
    started = time.perf_counter()
    run()
    return images / (time.perf_counter() - started)


def _memory(options: argparse.Namespace, folder: str) -> dict[str, object]:
    """Fill a cache of generated noise through Ray, and watch the driver and the actors."""
    return {}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="dinov2/vits14")
    parser.add_argument("--weights", default="random", help="random, or a file")
    parser.add_argument("--args", default="{}", help="of the teacher's constructor, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--codec", default="pca-int8-zstd")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs; without it they are generated at 256 px")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU: for decoding, and for a teacher there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="measure the Ray pipeline as well")
    parser.add_argument("--memory", action="store_true", help="watch memory instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
