"""The Ray Data pipelines of the cache: a row is a shard, and what travels is its number and what became of it.

Images and features never pass through the object store, where they cost ten times a read (ray_facts, section 3).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.cache.fill.extract import SHARDS_AT_ONCE, Extract
from pipeline.cache.fill.ingest import Ingest
from pipeline.cache.fill.placement import Measured, measure_on_gpu, place
from pipeline.errors import UserError
from pipeline.runtime import logs
from pipeline.runtime.ray_session import alive_node_resources, is_cluster

WORTH_MEASURING = 16
"""Shards from which on it pays to load the teachers once more, to measure them."""

log = logging.getLogger(__name__)


def gpus() -> int:
    """GPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0


def _room() -> int:
    """CPUs beside a GPU, or where there are none CPUs, of the node that has the fewest; 1 where no node is up yet."""
    nodes = alive_node_resources()
    if gpus():
        return min((int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU")), default=1)
    fewest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    return fewest if is_cluster() else min(fewest, os.cpu_count() or 1)


def ingest_shards(rows: Sequence[dict[str, Any]], ingest: Ingest) -> Iterator[dict[str, Any]]:
    """Run `ingest` on every row as tasks of one CPU, on any node; results as they come."""
    if rows:
        yield from _results(_dataset(rows).map(ingest, num_cpus=1))


def extract_shards(
    rows: Sequence[dict[str, Any]], arguments: tuple[Any, ...], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Run `Extract` on every row; results as they come.

    Args:
        arguments: the first ones of `Extract`: datasets and teachers.
    """
    datasets, teachers = arguments
    worth_it = len(rows) >= WORTH_MEASURING and gpus()
    measured = measure_on_gpu(datasets, teachers, batch_size, rows[0]) if worth_it else None
    yield from run_in_actors(Extract, rows, arguments, batch_size, measured)


def run_in_actors(
    actor: type,
    rows: Sequence[dict[str, Any]],
    arguments: tuple[Any, ...],
    batch_size: int,
    measured: Measured | None = None,
) -> Iterator[dict[str, Any]]:
    """A pool of actors, on GPUs where there are any (`pipeline/cache/fill/placement.py`).

    An actor takes several shards at once (`SHARDS_AT_ONCE`): one is on the device while others are decoded or written.
    """
    if not rows:
        return
    import ray
    from ray.data import ActorPoolStrategy

    cpus = int(ray.cluster_resources().get("CPU", 1))
    placed = place(cpus, gpus(), len(rows), _room(), measured)
    if placed.gpus:
        log.info("extraction: %s", placed)
    device = "cuda" if placed.gpus else "cpu"
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=placed.actors,
        max_concurrent_calls_per_actor=SHARDS_AT_ONCE[device],
        enable_true_multi_threading=True,
    )
    results = _dataset(rows).map(
        actor,
        fn_constructor_args=(*arguments, device, placed.threads, batch_size),
        compute=pool,
        num_cpus=placed.threads,
        num_gpus=placed.gpus,
    )
    yield from _results(results)


def _results(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they come.

    Raises:
        UserError: where none came for longer than Ray Data waits.
    """
    from ray.data.exceptions import ExecutionTimeoutError

    try:
        yield from dataset.iter_rows()
    except ExecutionTimeoutError as error:
        seconds = dataset.context.execution_no_progress_timeout_s
        raise UserError(
            f"no shard was finished for {seconds:g} s, and the job gave up; finished ones are kept. If a shard takes that "
            "long, lower cache.shard_size or raise RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S; else see whether a CPU is free"
        ) from error


def _dataset(rows: Sequence[dict[str, Any]]) -> Any:
    import ray.data

    carried = logs.row_context()
    return ray.data.from_items([{**row, **carried} for row in rows], override_num_blocks=len(rows))
