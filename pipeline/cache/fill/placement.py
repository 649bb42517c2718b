"""How teachers are placed on a cluster: actors a GPU by measured memory, threads an actor by measured stage times.

All teachers that are missing live in one actor, so that an image is decoded once for all of them. What they take is
measured by a probe on a GPU before the actors start. Imports Ray inside functions only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.cache.fill.extract import SHARDS_AT_ONCE, Extract, ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.view_rows import read_view_rows
from pipeline.errors import UserError
from teachers.base import TeacherError

MOST_ACTORS = 4
"""Most extraction actors on one GPU: each brings a CUDA context and a set of weights."""
SPARE_MEMORY = 0.1
"""Share of a GPU's memory that is left to fragments and to what a probe does not see."""
CONTEXT_BYTES = 600 << 20
"""Of a process on a GPU beside what torch's allocator knows: CUDA's context and kernels."""
MOST_THREADS = {"cpu": 8, "cuda": 32}
"""Most threads of an actor, by its device; beside a GPU they are processes (`pipeline/imaging/decoder_pool.py`)."""
SLACK = 1.25
"""Decoding is given this much more than the device needs, so that it stays ahead."""
BUSY = 0.9
"""Share of the time that a GPU should be busy."""
LONG_ENOUGH_S = 60.0
"""Extractions that are shorter say nothing: loading weights is most of them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What one actor with all missing teachers takes.

    Attributes:
        memory: bytes of the GPU at most, its context included; 0: not measured.
        total: bytes that the GPU has.
        device_s: seconds of the GPU for one view.
        host_s: seconds of one thread to decode and resize one view for all teachers.
    """

    memory: int
    total: int
    device_s: float
    host_s: float


@dataclass(frozen=True)
class Placement:
    """A pool of actors.

    Attributes:
        actors: at most.
        gpus: of each; a fraction where several share one.
        threads: CPUs of each.
    """

    actors: int
    gpus: float
    threads: int

    def __str__(self) -> str:
        share = f", each {self.gpus:.2g} of a GPU" if self.gpus else ""
        return f"{self.actors} actors{share}, {self.threads} threads each"


def actors_per_gpu(measured: Measured | None) -> int:
    """How many actors fit on one GPU; 1 where nothing was measured."""
    if measured is None or not measured.memory:
        return 1
    return max(1, min(MOST_ACTORS, int(measured.total * (1 - SPARE_MEMORY) / measured.memory)))


def place(cpus: int, gpus: int, rows: int, room: int, measured: Measured | None = None) -> Placement:
    """The pool for so many rows on a cluster of so many CPUs and GPUs.

    One CPU is left for the tasks that feed the actors: without it Ray Data starves (ray_facts, section 3).

    Args:
        room: CPUs beside a GPU, or where there are none CPUs, of the node that has the fewest: no actor may ask for more.
        measured: by a probe, or None: one actor a GPU, and as many threads as there are.
    """
    if not gpus:
        threads = max(1, min(MOST_THREADS["cpu"], room, cpus - 1))
        return Placement(min(rows, max(1, (cpus - 1) // threads)), 0, threads)
    each = actors_per_gpu(measured)
    available = max(1, min((cpus - 1) // gpus, room) // each)
    if measured is None or not measured.device_s:
        return Placement(min(rows, gpus * each), 1 / each, min(MOST_THREADS["cuda"], available))
    # Actors on one GPU take turns: together they need the threads that one alone would need.
    needed = math.ceil(SLACK * measured.host_s / measured.device_s / each)
    return Placement(min(rows, gpus * each), 1 / each, max(1, min(MOST_THREADS["cuda"], available, needed)))


def measure_on_gpu(
    datasets: Mapping[str, Dataset], teachers: Sequence[CachedTeacher], batch_size: int, row: Mapping[str, Any]
) -> Measured | None:
    """What an actor takes, on one of the cluster's GPUs; None where that cannot be found out, said aloud."""
    import ray

    task = ray.remote(num_gpus=1, num_cpus=1, max_retries=1)(measure)
    try:
        measured: Measured = ray.get(task.remote(datasets, teachers, batch_size, dict(row), "cuda"))
    except (ray.exceptions.RayError, UserError, TeacherError) as error:
        log.warning("teachers were not measured, so that each GPU gets one actor: %s", str(error).splitlines()[-1])
        return None
    return measured


def measure(
    datasets: Mapping[str, Dataset],
    teachers: Sequence[CachedTeacher],
    batch_size: int,
    row: Mapping[str, Any],
    device: str,
) -> Measured:
    """Load the teachers and ask them about two batches of the shard that a row names."""
    import torch

    extract = Extract(datasets, teachers, device, 1, batch_size)
    views = read_view_rows(datasets[row["split"]], int(row["shard"])).slice(0, batch_size)
    rows = views.rows.num_rows
    for _ in range(2):  # the first round warms up, here as below
        started = time.perf_counter()
        batches = list(extract.rendered(views, list(extract.teachers)))
        host = time.perf_counter() - started
    for _ in range(2):
        started = time.perf_counter()
        for pixels in batches:
            for name, batch in pixels.items():
                extract.encode(name, batch)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    if device != "cuda":
        return Measured(0, 0, seconds / rows, host / rows)
    _fill_memory(extract, batches)
    memory = torch.cuda.max_memory_reserved() + CONTEXT_BYTES
    return Measured(memory, torch.cuda.mem_get_info()[1], seconds / rows, host / rows)


def _fill_memory(extract: Extract, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Encode and store batches on as many threads as an actor has, so that its memory is at its peak."""

    def store(_: int) -> None:
        with extract.device.beside():
            for pixels in batches:
                for name, batch in pixels.items():
                    ShardBuilder(extract.cached[name], "", None).add(*extract.encode(name, batch))

    threads = SHARDS_AT_ONCE[extract.device.name]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(store, range(threads)))


STAGES = {
    "read": ("reading images from the cache", "bring the cache nearer to the nodes"),
    "render": ("decoding and resizing", "more CPUs a GPU, or smaller images"),
    "encode": ("the codec", "another cache.codec, as float16"),
    "write": ("writing", "a faster store, or a smaller cache.codec"),
}
"""What an actor does beside the teacher's forward, and what helps where that is the limit."""


def starved(stages: Mapping[str, float], seconds: float, gpus: int) -> str:
    """Which stage keeps the GPUs waiting, in words; "" where they are busy enough, or the time was too short to tell.

    Args:
        stages: seconds by stage over all actors: ``teacher``, on the GPU, and those of `STAGES`.
        seconds: wall-clock time of the extraction.
        gpus: that took part.
    """
    busy = stages.get("teacher", 0.0) / max(1e-9, seconds * gpus) if gpus else 1.0
    if busy >= BUSY or seconds < LONG_ENOUGH_S:
        return ""
    others = {name: stages.get(name, 0.0) for name in STAGES}
    worst = max(others, key=lambda name: others[name])
    what, remedy = STAGES[worst]
    share = others[worst] / max(1e-9, sum(stages.values()))
    return f"the GPUs were busy {busy:.0%} of the extraction; {what} takes {share:.0%} of the actors' time: {remedy}"
