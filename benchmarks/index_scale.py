"""Measure plan and start of a training worker on a made-up data set of any size.

    python benchmarks/index_scale.py --images 100000000

Writes what a cache keeps of tars of 5,000 images and three teachers (a version, and the records of shards; the shards themselves
are empty files), and times, each in a process of its own:

- plan: `plan_cache` on an unchanged source, until missing shards, bytes and fidelity of every teacher are known;
- start: a training worker's reader among eight, until it knows its steps, the quality of its shuffle and its first rows.

Both are measured at the given size and at a tenth of it, in seconds, in processor seconds of the process, and in GiB of its
largest resident memory, imports included in both. Prints a table and one line of JSON.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cache.fill.estimate import missing_bytes
from pipeline.cache.fill.plan import CachePlan, plan_cache
from pipeline.cache.layout.cached_teacher import teacher_fidelity
from pipeline.cache.layout.dataset import Dataset, Selection, write_dataset
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.shards import RECORDS, ShardRecord, dump_records
from pipeline.cache.read.reader import CacheReader
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.sources.open import open_source
from pipeline.storage.store import Store

IMAGES, SHARD_SIZE = 5000, 512
"""Images of a tar, and of a shard."""
TEACHERS = "[timm/mobilenetv2_100, {model: timm/mobilenetv3_small_100, weights: random}, hog]"
WORKERS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--part", choices=("plan", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(_measured(options.part, options.folder)))
        return
    found: dict[str, float] = {}
    for name, images in (("", options.images), ("_tenth", options.images // 10)):
        with TemporaryDirectory() as folder:
            started = time.perf_counter()
            make_up(Path(folder), max(1, images // IMAGES))
            print(
                f"{images:,} images in {images // IMAGES:,} tars, made up in {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            for part in ("plan", "start"):
                command = [sys.executable, __file__, "--part", part, "--folder", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                label = "plan" if part == "plan" else "train_start"
                found |= {f"{label}_{unit}{name}": figure for unit, figure in figures.items()}
                print(
                    f"  {part:<6}" + "  ".join(f"{figure:8.2f} {unit}" for unit, figure in figures.items()), flush=True
                )
    print(json.dumps({"images": options.images, **found}))


def make_up(folder: Path, tars: int) -> None:
    """Tars, which are empty, and a cache that has everything of them."""
    (folder / "tars").mkdir()
    for number in range(tars):
        (folder / f"tars/{number:06d}.tar").touch()
    source = open_source(str(folder / "tars"), split="train")
    chosen = tuple(
        Selection(
            part=f"{number:020x}",
            images=IMAGES,
            shard_size=SHARD_SIZE,
            file=f"rows-{number:016x}.parquet",
            content="0" * 32,
            samples=IMAGES,
            labelled=IMAGES,
            bytes=IMAGES * 110_000,
            whole=True,
            files=(number,),
        )
        for number in range(tars)
    )
    files = tuple(sorted(source.versions().items()))
    dataset = Dataset(Store.at(folder / "cache"), source.name, source.location, (), files, chosen)
    for selection in chosen:
        Path(dataset.store.uri).mkdir(parents=True, exist_ok=True)
        Path(dataset.store.uri, selection.file).touch()  # it is looked for, and not read
    write_dataset(dataset)
    teachers = [teacher.id for teacher in plan_cache(_config(folder), dataset.cache).teachers]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(partial(_make_up_part, teachers=teachers), dataset.parts):
            pass


def _make_up_part(part: Part, teachers: Sequence[str]) -> None:
    for folder in (part.images, *map(part.teacher, teachers)):
        place = Path(folder.store.uri)
        place.mkdir(parents=True)
        records = {}
        for shard in range(part.shards):
            stem = f"shard-{shard:05d}-00000000"
            kinds = {"target_cosine": 0.995, "target_cosine_p1": 0.97, "relative_error": 0.05}
            facts = {
                "device": "cpu",
                "device_seconds": 1.5,
                "torch": "2",
                "fidelity": {"summary": kinds, "patches": kinds},
            }
            records[shard] = ShardRecord(
                shard, f"{stem}.parquet", part.shard_rows(shard), 0, "0" * 64, f"{stem}.npz", "", facts
            )
            for name in (f"{stem}.parquet", f"{stem}.npz", f"shard-{shard:05d}.json"):
                os.close(os.open(place / name, os.O_CREAT))
        (place / RECORDS).write_bytes(dump_records(records.values()))


def _measured(part: str, folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    if part == "plan":
        _plan(folder)
    else:
        _start(folder)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    figures = {"s": seconds, "cpu_s": used.ru_utime + used.ru_stime, "gib": used.ru_maxrss / 2**20}
    return {name: round(value, 3) for name, value in figures.items()}


def _config(folder: Path) -> DistillJobConfig:
    return load_config(
        DistillJobConfig, None, [f"data.train={folder}/tars", f"teachers={TEACHERS}", "cache.codec=int8"]
    )


def _plan(folder: Path) -> CachePlan:
    plan = plan_cache(_config(folder), Store.at(folder / "cache"))
    assert not missing_bytes(plan)
    for teacher in plan.teachers:
        assert teacher_fidelity(plan.splits[0].dataset, teacher)["patches"]
    (folder / "job.pkl").write_bytes(pickle.dumps((plan.splits[0].dataset, plan.teachers)))
    return plan


def _start(folder: Path) -> None:
    dataset, teachers = pickle.loads((folder / "job.pkl").read_bytes())  # noqa: S301  written above
    reader = CacheReader(dataset, teachers, image_size=224, batch_size=128, window=8192, rank=3, world=WORKERS)
    assert reader.steps(0) > 0
    reader.shuffle_quality()
    next(reader.order.windows(0, reader.steps(0) // 2 * 128))


if __name__ == "__main__":
    main()
