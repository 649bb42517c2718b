"""Measure extraction against the rate of the teacher alone, and its memory over time.

    python benchmarks/extraction.py --teacher dinov2/vits14 --images 256
    python benchmarks/extraction.py --device cuda --teacher dinov2/vitb14 --precision bfloat16 --batch-size 256 \
        --images 16384 --shard-size 512 --threads 14
    python benchmarks/extraction.py --memory --images 50000

Measures each stage alone on the first images: `teacher`, forward passes over resized batches in host memory (pinned for a GPU,
without a synchronisation between batches); `render`, JPEG decoding and resizing; `encode`, codec and statistics of features.
Then `Extract` over whole shards, as many in parallel as in its actor, from reading images to committing features. Weights are
random unless `--weights` names a file. Rounds are interleaved; prints a table and one line of JSON with medians over the rounds:

    ratio           rate of `Extract` over that of its slowest stage
    teacher_ratio   over that of the teacher
    cpu_ratio       share of the slowest stage in processor time: on a CPU the stages share the cores, so it bounds `ratio`,
                    and if other programs run, it alone is meaningful
    render_own_us   time per image that rendering takes from the thread that feeds the GPU, while other processes decode

`--memory` extracts HOG from many small images through Ray, and plots the resident memory of driver and actor over time. Only this
needs Ray and MLflow.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.runtime.allocator import keep_freed_memory

if not sys.modules.get("torch"):  # threads must not have started
    keep_freed_memory()

import torch
from torch import Tensor

from benchmarks.memory import growth, report, watch_memory
from benchmarks.synthetic_cache import jpegs, read_photos, write_dataset
from pipeline.cache.config import TeacherConfig
from pipeline.cache.fill.extract import CONCURRENT_SHARDS, Extract
from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs, make_teacher
from pipeline.cache.layout.keys import teacher_id
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.stats import MomentSums
from pipeline.cache.layout.view_rows import read_view_rows

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "memory_extract.png"
ALONE = 2048
"""Images for measuring stages alone, at most."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure speed, or with --memory memory."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        print(json.dumps(_memory(folder, options) if options.memory else _speed(folder, options)))


def _speed(folder: str, options: argparse.Namespace) -> dict[str, object]:
    count = options.images or 256
    shard_size = options.shard_size or -(-count // CONCURRENT_SHARDS[options.device])
    dataset = write_dataset(folder, count, read_photos(options.photos) if options.photos else jpegs(256), shard_size)
    given = {"model": options.teacher, "weights": options.weights, "input_size": options.input_size}
    config = TeacherConfig(**given, args=json.loads(options.args))
    teacher = _load(config, options)
    (part,) = dataset.parts
    extract = Extract(
        {part.key: part},
        [(part.key, n) for n in range(part.shards)],
        [teacher],
        options.device,
        options.threads,
        options.batch_size,
    )
    stages = Stages(part, teacher, extract)
    alone = {"teacher": stages.forward, "render": stages.render, "encode": stages.encode}
    ways = {**alone, "extract": stages.extract}
    rounds = [{name: _timed(run) for name, run in ways.items()} for _ in range(options.rounds)]
    rates = {name: round(1 / median(found[name][0] for found in rounds), 1) for name in ways}
    slowest = min(alone, key=rates.__getitem__)

    def ratio(stage: str, kind: int) -> float:
        return round(median(found[stage][kind] / found["extract"][kind] for found in rounds), 3)

    print(f"{teacher.spec.name}, {options.codec}, {options.device}, {options.precision}")
    print("\n".join(f"  {name:<10}{rate:>10,.1f} images/s" for name, rate in rates.items()))
    spent = ", ".join(f"{name} {1e6 * seconds:,.0f}" for name, seconds in stages.seconds.items())
    print(f"microseconds per image of the threads that process shards: {spent}")
    return {
        "ratio": ratio(slowest, 0),
        "teacher_ratio": ratio("teacher", 0),
        "slowest": slowest,
        "cpu_ratio": ratio(slowest, 1),
        "render_own_us": round(1e6 * median(found["render"][1] for found in rounds), 1),
        "images_per_second": rates,
        "decoder": options.decoder,
        "teacher": teacher.spec.name,
        "weights": options.weights,
    }


def _load(config: TeacherConfig, options: argparse.Namespace) -> CachedTeacher:
    teacher = make_teacher(config)
    teacher.load()  # which finds the digest of its weights
    settings = {"codec": options.codec, "precision": options.precision, "decoder": options.decoder}
    name = teacher_id(teacher.spec, **settings)
    return CachedTeacher(config, teacher.spec, name, **settings, weights_sha256=teacher.weights_sha256)


class Stages:
    """The measured stages, on the shards of one part; each returns its number of images."""

    def __init__(self, part: Part, teacher: CachedTeacher, extractor: Extract) -> None:
        self.part, self.cached, self.extractor = part, teacher, extractor
        self.teacher = self.extractor.teachers[teacher.id]
        self.device = self.extractor.device.name
        self.seconds: dict[str, float] = {}
        self.extract()
        shards = list(part.images.records().values())
        self.alone = shards[: max(1, ALONE // shards[0].rows)]
        self.pixels = list(self._rendered())
        if self.device == "cuda":
            self.pixels = [pixels.pin_memory() for pixels in self.pixels]
        self.features = [self.teacher.encode(pixels) for pixels in self.pixels]
        self.codecs = {kind: codec.to(self.device) for kind, codec in load_codecs(part.cache, teacher).items()}

    def forward(self) -> int:
        """Forward passes over resized batches."""
        for pixels in self.pixels:
            self.teacher.encode(pixels)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return sum(map(len, self.pixels))

    def render(self) -> int:
        """Reading, decoding and resizing."""
        return sum(map(len, self._rendered()))

    def encode(self) -> int:
        """Codec and statistics."""
        for kind, codec in self.codecs.items():
            sums = MomentSums()
            for output in self.features:
                features = getattr(output, kind)
                codec.encode(features)
                sums.add(features)
            sums.moments()
        return sum(len(output.patches) for output in self.features)

    def extract(self) -> int:
        """All stages, several shards in parallel."""
        rows: list[dict[str, object]] = [{"part": self.part.key, "shard": shard} for shard in range(self.part.shards)]
        for shard in range(self.part.shards):
            self.part.teacher(self.cached.id).unlist(shard)
        images, stages = 0, Counter[str]()
        with ThreadPoolExecutor(CONCURRENT_SHARDS[self.device]) as pool:
            for row in pool.map(self.extractor, rows):
                assert row["computed"] == 1, row
                images += row["images"]
                stages.update(json.loads(row["stages"]))
        self.seconds = {name: seconds / images for name, seconds in stages.items()}
        return images

    def _rendered(self) -> Iterator[Tensor]:
        for record in self.alone:
            for batch in self.extractor.rendered(read_view_rows(self.part, record.shard), [self.cached.id]):
                yield batch[self.cached.id]


def _timed(run: Callable[[], int]) -> tuple[float, float]:
    """Seconds per image of wall-clock and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    images = run()
    return (time.perf_counter() - clock) / images, (time.process_time() - processor) / images


def _memory(folder: str, options: argparse.Namespace) -> dict[str, object]:
    from pipeline.cache.fill.ray_pipeline import extract_shards
    from pipeline.runtime.ray_session import connect

    (part,) = write_dataset(folder, options.images or 50000, jpegs(48), 512).parts
    teacher = _load(TeacherConfig(model="hog", input_size=options.side), options)
    rows = [{"part": part.key, "shard": shard} for shard in range(part.shards)]
    arguments = {part.key: part}, [(part.key, shard) for shard in range(part.shards)], [teacher]
    with connect(), watch_memory("driver", {"Extract": "actor"}) as curves:
        images = sum(row["images"] for row in extract_shards(rows, arguments, options.batch_size))
    means = report(curves, options.figure, f"Extracting HOG at {options.side} px of {images:,} images")
    return {"ratio": growth(means), "images": images, "resident_mib": means}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="dinov2/vits14")
    parser.add_argument("--weights", default="random", help="random, or a file")
    parser.add_argument("--input-size", type=int, help="pixels; default: the teacher's own")
    parser.add_argument("--args", default="{}", help="of the teacher's constructor, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--codec", default="pca-int8-zstd")
    parser.add_argument("--decoder", choices=("cpu", "nvjpeg"), default="cpu", help="of the images; nvjpeg needs a GPU")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs; default: synthetic images of 256 px")
    parser.add_argument("--images", type=int, help="256, or 50,000 with --memory")
    parser.add_argument("--shard-size", type=int, help="images; default: as many shards as are processed in parallel")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU: for decoding, and for a teacher there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="watch memory instead")
    parser.add_argument("--side", type=int, default=48, help="with --memory: pixels of HOG's input")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="with --memory: PNG file of memory over time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
