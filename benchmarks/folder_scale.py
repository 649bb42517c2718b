"""Measure the dry run of a large folder of images, beside `find`.

    python benchmarks/folder_scale.py --files 1281000

Makes up class folders of 1,281 hard links to a few JPEGs, and measures, each as a process of its own:

- imports: `jobs/precompute.py --dry-run` of a folder of one file;
- find: `find <folder> -printf '%p %s %T@\n'`, which asks the system for what a listing needs, just before each of the others;
- new: the dry run of the folder without a cache;
- known: the same with a cache that knows all files, whose rows are in random order, as those of a folder are;
- changed: the same when one of the JPEGs, and with it all links to it, has been touched since.

Prints a table and one line of JSON: seconds, processor seconds, and GiB of the process's largest resident memory, which includes
the libraries; and the `ratio` of the processor seconds of each dry run, without imports, and of the `find` before it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.cache.layout.dataset import BAD_SCHEMA, SAMPLE_SCHEMA, Dataset, make_dataset, write_dataset
from pipeline.cache.layout.part import KEY, Part
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.open import open_source
from pipeline.storage.store import Store

JOB = Path(__file__).resolve().parent.parent / "jobs" / "precompute.py"
FILES_OF_A_CLASS, JPEGS = 1281, 32
PART, SHARD_SIZE = 1 << 15, 512
"""Images of a part, and of a shard."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder up, and measure both dry runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=128_100)
    parser.add_argument("--teacher", default="hog", help="of the recipe")
    options = parser.parse_args(arguments)
    found: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        photos, cache = Path(folder, "photos"), Path(folder, "cache")
        make_up(photos, max(1, options.files // FILES_OF_A_CLASS))
        find = ["find", str(photos), "-printf", "%p %s %T@\\n"]
        job = [sys.executable, str(JOB), "--dry-run", f"teachers=[{options.teacher}]", f"work={folder}/work"]
        imports = _report(found, "imports", [*job, f"data.train={photos.parent}/one", f"cache.uri={folder}/none"])
        for name in ("new", "known", "changed"):
            if name == "known":
                # A process begins with the largest memory of the one that starts it.
                apart = get_context("spawn").Process(target=remember, args=(photos, cache))
                apart.start()
                apart.join()
            elif name == "changed":
                os.utime(photos.parent / "jpegs" / "0.jpg")
            beside = _report(found, f"find_{name}", find)
            spent = _report(found, name, [*job, f"data.train={photos}", f"cache.uri={cache}"])
            found[f"{name}_ratio"] = round((spent - imports) / max(beside, 0.01), 2)  # a few files take no time
    print(json.dumps({"files": options.files // FILES_OF_A_CLASS * FILES_OF_A_CLASS, **found}))


def _report(found: dict[str, float], name: str, command: Sequence[str]) -> float:
    """Print and add the figures of a process; returns its processor seconds."""
    figures = _measured(command)
    found |= {f"{name}_{unit}": value for unit, value in figures.items()}
    print(f"{name:<14}" + "  ".join(f"{value:8.2f} {unit}" for unit, value in figures.items()), flush=True)
    return figures["cpu_s"]


def make_up(photos: Path, classes: int) -> None:
    """Class folders of hard links, and beside them a class folder of one file."""
    rng = np.random.default_rng(0)
    (photos.parent / "jpegs").mkdir()
    jpegs = [photos.parent / f"jpegs/{number}.jpg" for number in range(JPEGS)]
    for jpeg in jpegs:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(jpeg)
    for number in range(classes):
        folder = photos / f"n{number:08d}"
        folder.mkdir(parents=True)
        for file in range(FILES_OF_A_CLASS):
            os.link(jpegs[file % JPEGS], folder / f"n{number:08d}_{file}.JPEG")
    (photos.parent / "one" / "n").mkdir(parents=True)
    os.link(jpegs[1], photos.parent / "one" / "n" / "0.jpg")


def remember(photos: Path, cache: Path) -> None:
    """A version of the folder in a cache, without shards."""
    source = open_source(str(photos), split="train")
    assert isinstance(source, ImageFolder)
    listed, rng = source.listed(), np.random.default_rng(0)
    index = listed.index()
    empty = Dataset(
        Store.at(cache), source.name, source.location, source.classes, listed=(listed.digest, index.num_rows)
    )
    parts, samples, order = [], {}, rng.permutation(index.num_rows)
    for first in range(0, len(order), PART):
        rows = order[first : first + PART]
        part = Part(empty.cache, f"{first:020x}", len(rows), SHARD_SIZE)
        keys = pa.FixedSizeBinaryArray.from_buffers(KEY, len(rows), [None, pa.py_buffer(rng.bytes(16 * len(rows)))])
        columns = [*index.take(pa.array(rows)).columns, keys, pa.array(np.arange(len(rows)))]
        parts.append(part)
        samples[part.id] = pa.table(columns, schema=SAMPLE_SCHEMA)
    write_dataset(make_dataset(empty, parts, samples, BAD_SCHEMA.empty_table()))


def _measured(command: Sequence[str]) -> dict[str, float]:
    """Seconds, processor seconds and GiB of a process and its children."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    seconds = {"s": time.perf_counter() - started, "cpu_s": used.ru_utime + used.ru_stime}
    return {name: round(value, 2) for name, value in {**seconds, "gib": used.ru_maxrss / 2**20}.items()}


if __name__ == "__main__":
    main()
