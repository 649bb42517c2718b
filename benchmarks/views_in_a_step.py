"""Measure the gain of decoding an image once for all of its views in a step: views per second of processor time.

    python benchmarks/views_in_a_step.py                        synthetic JPEGs of 448 px, four crops each at 224 px
    python benchmarks/views_in_a_step.py --images photos/train  photographs

Settings are interleaved; the median over the rounds counts. Processor time of all threads hardly depends on other programs.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic_cache import jpegs, read_photos, write_dataset
from pipeline.cache.fill.ingest import commit_crops
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import CacheReader
from pipeline.imaging.geometry import ViewPolicy

PER_STEP = (1, 2, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    files = read_photos(options.images) if options.images else None
    with TemporaryDirectory() as folder:
        dataset = write_dataset(folder, options.count, files or jpegs(options.side), 256)
        dataset = replace(dataset, policy=ViewPolicy(crops=max(PER_STEP)))
        for shard in range(dataset.shards):
            commit_crops(dataset, shard)
        rates: dict[int, list[float]] = {views: [] for views in PER_STEP}
        for epoch in range(options.rounds):
            for views, measured in rates.items():
                measured.append(_rate(dataset, views, epoch, options))
    found = {views: median(measured) for views, measured in rates.items()}
    figures = {f"images_per_cpu_second_{views}": round(rate, 1) for views, rate in found.items()}
    gains = {f"gain_{views}": round(found[views] / found[1], 3) for views in PER_STEP[1:]}
    print(json.dumps({**figures, **gains, "threads": options.threads, "rounds": options.rounds}))


def _rate(dataset: Dataset, views: int, epoch: int, options: argparse.Namespace) -> float:
    reader = CacheReader(
        dataset, (), image_size=options.size, batch_size=64, window=512, threads=options.threads, per_step=views
    )
    started = time.process_time()
    images = sum(len(batch.keys) for batch in reader.batches(epoch))
    return images / (time.process_time() - started)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs, at any depth; default: synthetic images")
    parser.add_argument("--side", type=int, default=448, help="of synthetic images in pixels")
    parser.add_argument("--size", type=int, default=224, help="side of the student's input in pixels")
    parser.add_argument("--count", type=int, default=512, help="images in the cache")
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    parser.add_argument("--rounds", type=int, default=5, help="visits of each setting")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
