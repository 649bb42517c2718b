"""Placement of teachers on a cluster: actors per GPU by measured memory, threads per actor by measured stage times.

One actor holds all teachers with missing shards, so that an image is decoded once for all of them. A probe on a GPU
measures what they need before the actors start. Imports Ray inside functions only.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.cache.fill.extract import CONCURRENT_SHARDS, Extract
from pipeline.cache.fill.shard_builder import ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.view_rows import read_view_rows
from pipeline.errors import UserError
from pipeline.imaging.gpu_decode import NvjpegPool
from teachers.base import TeacherError

MOST_ACTORS = 4
"""Most extraction actors on one GPU: each brings a CUDA context and a set of weights."""
SPARE_MEMORY = 0.1
"""Share of a GPU's memory kept free for fragmentation and for what a probe does not see."""
CONTEXT_BYTES = 600 << 20
"""GPU memory of a process outside torch's allocator: CUDA's context and kernels."""
MOST_THREADS = {"cpu": 8, "cuda": 32}
"""Most threads of an actor, by its device; with a GPU they are processes (`pipeline/imaging/decoder_pool.py`)."""
SLACK = 1.25
"""Decoding capacity relative to what the device needs, so that it stays ahead."""
BUSY = 0.9
"""Share of the time that a GPU should be busy."""
LONG_ENOUGH_S = 60.0
"""Shorter extractions are not judged: loading weights dominates them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Cost of one actor with all missing teachers.

    Attributes:
        memory: peak GPU memory in bytes, CUDA's context and decoders on the GPU included; 0: not measured.
        total: the GPU's memory in bytes.
        device_s: seconds of the GPU per view.
        host_s: seconds of one thread to decode and resize one view for all teachers.
    """

    memory: int
    total: int
    device_s: float
    host_s: float


@dataclass(frozen=True)
class Placement:
    """A pool of at most `actors` actors; `gpus` (a fraction if several share one) and `threads` (CPUs) are per actor."""

    actors: int
    gpus: float
    threads: int

    def __str__(self) -> str:
        share = f", each {self.gpus:.2g} of a GPU" if self.gpus else ""
        return f"{self.actors} actors{share}, {self.threads} threads each"


def actors_per_gpu(measured: Measured | None) -> int:
    """Number of actors that fit on one GPU; 1 if nothing was measured."""
    if measured is None or not measured.memory:
        return 1
    return max(1, min(MOST_ACTORS, int(measured.total * (1 - SPARE_MEMORY) / measured.memory)))


def place(cpus: int, gpus: int, rows: int, node_cpus: int, measured: Measured | None = None) -> Placement:
    """The actor pool for `rows` shards on a cluster with these CPUs and GPUs.

    One CPU is left to the tasks that feed the actors; without it, Ray Data stalls.

    Args:
        node_cpus: CPUs per GPU on the node that has fewest (without GPUs: its CPUs); no actor may request more.
        measured: by a probe; None: one actor per GPU with all available threads.
    """
    if not gpus:
        threads = max(1, min(MOST_THREADS["cpu"], node_cpus, cpus - 1))
        return Placement(min(rows, max(1, (cpus - 1) // threads)), 0, threads)
    each = actors_per_gpu(measured)
    available = max(1, min((cpus - 1) // gpus, node_cpus) // each)
    if measured is None or not measured.device_s:
        return Placement(min(rows, gpus * each), 1 / each, min(MOST_THREADS["cuda"], available))
    # Actors that share a GPU take turns: together they need as many threads as one alone.
    needed = math.ceil(SLACK * measured.host_s / measured.device_s / each)
    return Placement(min(rows, gpus * each), 1 / each, max(1, min(MOST_THREADS["cuda"], available, needed)))


def measure_on_gpu(
    parts: Mapping[str, Part],
    basis: Sequence[tuple[str, int]],
    teachers: Sequence[CachedTeacher],
    batch_size: int,
    row: Mapping[str, Any],
) -> Measured | None:
    """Measure an actor on one of the cluster's GPUs; None, with a warning, if that fails."""
    import ray

    task = ray.remote(num_gpus=1, num_cpus=1, max_retries=1)(measure)
    try:
        return ray.get(task.remote(parts, basis, teachers, batch_size, dict(row), "cuda"))
    except (ray.exceptions.RayError, UserError, TeacherError) as error:
        log.warning("could not measure the teachers, so each GPU gets one actor: %s", str(error).splitlines()[-1])
        return None


def measure(
    parts: Mapping[str, Part],
    basis: Sequence[tuple[str, int]],
    teachers: Sequence[CachedTeacher],
    batch_size: int,
    row: Mapping[str, Any],
    device: str,
) -> Measured:
    """Load the teachers and time them on the first images of the shard that a row names."""
    import torch

    extract = Extract(parts, basis, teachers, device, 1, batch_size)
    views = read_view_rows(parts[row["part"]], int(row["shard"])).slice(0, batch_size)
    on_gpu = device == "cuda" and isinstance(extract.decoders, NvjpegPool)
    free = torch.cuda.mem_get_info()[0] if on_gpu else 0
    for _ in range(2):  # the first round warms up, here and below
        started = time.perf_counter()
        batches = list(extract.rendered(views, list(extract.teachers)))
        host = time.perf_counter() - started
    # Of the processes that decode on the GPU; this one allocates nothing there meanwhile.
    decoders = max(0, free - torch.cuda.mem_get_info()[0]) if on_gpu else 0
    for _ in range(2):
        started = time.perf_counter()
        for pixels in batches:
            for name, batch in pixels.items():  # of a share as many as it has on average
                extract.encode(name, batch[: max(1, round(extract.cached[name].share * len(batch)))])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    memory = total = 0
    if device == "cuda":
        _fill_memory(extract, batches)
        memory, total = torch.cuda.max_memory_reserved() + CONTEXT_BYTES + decoders, torch.cuda.mem_get_info()[1]
    return Measured(memory, total, seconds / views.rows.num_rows, host / views.rows.num_rows)


def _fill_memory(extract: Extract, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Encode batches on as many threads as an actor uses, so that memory reaches its peak."""

    def store(_: int) -> None:
        with extract.device.side_stream():
            for pixels in batches:
                for name, batch in pixels.items():
                    ShardBuilder(extract.cached[name], "", None).add(*extract.encode(name, batch))

    threads = CONCURRENT_SHARDS[extract.device.name]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(store, range(threads)))


STAGES = {
    "read": ("reading images from the cache", "move the cache closer to the nodes"),
    "render": ("decoding and resizing", "more CPUs per GPU, or smaller images"),
    "encode": ("the codec", "another cache.codec, such as float16"),
    "write": ("writing", "a faster store, or a smaller cache.codec"),
}
"""Stages of an actor other than the teacher's forward, and the remedy for each if it is the bottleneck."""


def starved(stages: Mapping[str, float], seconds: float, gpus: int) -> str:
    """A message that names the stage for which the GPUs wait; "" if they are busy enough or the time was too short.

    Args:
        stages: seconds by stage over all actors: ``teacher`` (on the GPU) and those of `STAGES`.
        seconds: wall-clock time of the extraction.
    """
    busy = stages.get("teacher", 0.0) / max(1e-9, seconds * gpus) if gpus else 1.0
    if busy >= BUSY or seconds < LONG_ENOUGH_S:
        return ""
    worst = max(STAGES, key=lambda name: stages.get(name, 0.0))
    what, remedy = STAGES[worst]
    share = stages.get(worst, 0.0) / max(1e-9, sum(stages.values()))
    return f"the GPUs were busy {busy:.0%} of the extraction; {what} takes {share:.0%} of the actors' time: {remedy}"
