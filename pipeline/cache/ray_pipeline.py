"""The Ray Data pipelines of the cache: a row is a shard, and what travels is its number and what became of it.

Images and features never pass through the object store, where they cost ten times a read (ray_facts, section 3).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import logs
from pipeline.cache.extract import Extract
from pipeline.cache.ingest import Ingest
from pipeline.cache.verify import Verify


def ingest_shards(rows: Sequence[dict[str, Any]], ingest: Ingest) -> Iterator[dict[str, Any]]:
    """Run `ingest` on every row as tasks of one CPU, on any node; results as they come."""
    if rows:
        yield from _dataset(rows).map(ingest, num_cpus=1).iter_rows()


def extract_shards(
    rows: Sequence[dict[str, Any]], arguments: tuple[Any, ...], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Run `Extract` on every row; results as they come.

    Args:
        arguments: the first ones of `Extract`: datasets and teachers.
    """
    yield from _in_actors(Extract, rows, arguments, batch_size)


def verify_shards(
    rows: Sequence[dict[str, Any]], arguments: tuple[Any, ...], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Run `Verify` on every row; results as they come.

    Args:
        arguments: the first ones of `Verify`.
    """
    yield from _in_actors(Verify, rows, arguments, batch_size)


def _in_actors(
    actor: type[Extract] | type[Verify], rows: Sequence[dict[str, Any]], arguments: tuple[Any, ...], batch_size: int
) -> Iterator[dict[str, Any]]:
    """A pool of actors, one per GPU where there are any.

    An actor takes two shards at once: one is on the device while the other is decoded or written.
    """
    if not rows:
        return
    import ray
    from ray.data import ActorPoolStrategy

    cpus, gpus = int(ray.cluster_resources().get("CPU", 1)), int(ray.cluster_resources().get("GPU", 0))
    # One CPU is left for the tasks that feed the actors: without it Ray Data starves (ray_facts, section 3).
    threads = max(1, min(8, (cpus - 1) // gpus) if gpus else min(os.cpu_count() or 1, cpus - 1))
    actors = min(len(rows), gpus or max(1, (cpus - 1) // threads))
    pool = ActorPoolStrategy(
        min_size=1, max_size=actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )
    results = _dataset(rows).map(
        actor,
        fn_constructor_args=(*arguments, "cuda" if gpus else "cpu", threads, batch_size),
        compute=pool,
        num_cpus=threads,
        num_gpus=1 if gpus else 0,
    )
    yield from results.iter_rows()


def _dataset(rows: Sequence[dict[str, Any]]) -> Any:
    import ray.data

    carried = logs.carried()
    return ray.data.from_items([{**row, **carried} for row in rows], override_num_blocks=len(rows))
