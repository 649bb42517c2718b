"""The Ray Data pipelines of the cache: a row is a shard, and carries only its number and the outcome.

Images and features do not pass through Ray's object store, which would cost ten times as much as reading them.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.cache.fill.extract import CONCURRENT_SHARDS, Extract
from pipeline.cache.fill.inline_arguments import inline_small_arguments
from pipeline.cache.fill.placement import Measured, measure_on_gpu, place
from pipeline.cache.layout.part import Part
from pipeline.errors import UserError
from pipeline.runtime import logs
from pipeline.runtime.progress import Progress
from pipeline.runtime.ray_session import alive_node_resources, devices, is_cluster, is_connected, is_in_process

WORTH_MEASURING = 16
"""Least number of shards for which loading the teachers once more to measure them pays off."""

log = logging.getLogger(__name__)


def gpus() -> int:
    """GPUs of the session."""
    return int(devices()[0]) if is_in_process() or is_connected() else 0


def _node_cpus() -> int:
    """CPUs per GPU on the node that has fewest (without GPUs: its CPUs); 1 while no node is up."""
    nodes = alive_node_resources()
    if gpus():
        return min((int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU")), default=1)
    fewest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    return fewest if is_cluster() else min(fewest, os.cpu_count() or 1)


def finished_shards(
    run: Callable[[Sequence[dict[str, Any]]], Iterable[dict[str, Any]]],
    rows: Sequence[dict[str, Any]],
    parts: Mapping[str, Part],
    label: str,
) -> Iterator[dict[str, Any]]:
    """The results of `run` for these rows (part, shard), with progress; UserError for the first with an ``error``."""
    total = sum(parts[row["part"]].shard_rows(row["shard"]) for row in rows)
    with Progress(total, "img", label) as progress:
        for row in run(rows):
            if row["error"]:
                raise UserError(row["error"])
            progress.update(parts[row["part"]].shard_rows(row["shard"]))
            yield row


def run_tasks(
    rows: Sequence[dict[str, Any]], task: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Run `task` on every row as tasks of one CPU, on any node; yields results as they arrive."""
    if is_in_process():
        yield from map(task, _carried(rows))
    elif rows:
        yield from _results(_dataset(rows).map(task, num_cpus=1))


def extract_shards(
    rows: Sequence[dict[str, Any]], arguments: tuple[Any, ...], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Run `Extract` with these parts, basis and teachers on every row; yields results as they arrive."""
    parts, basis, teachers = arguments
    worth_it = len(rows) >= WORTH_MEASURING and gpus() and not is_in_process()
    measured = measure_on_gpu(parts, basis, teachers, batch_size, rows[0]) if worth_it else None
    yield from run_in_actors(Extract, rows, arguments, batch_size, measured)


def run_in_actors(
    actor: type,
    rows: Sequence[dict[str, Any]],
    arguments: tuple[Any, ...],
    batch_size: int,
    measured: Measured | None = None,
) -> Iterator[dict[str, Any]]:
    """Run an actor class on every row, on GPUs if there are any (`pipeline/cache/fill/placement.py`).

    Args:
        arguments: the first arguments of `actor`; device, threads and batch size follow.
    """
    if not rows:
        return
    if is_in_process():
        device = "cuda" if gpus() else "cpu"
        yield from map(actor(*arguments, device, os.cpu_count() or 1, batch_size), _carried(rows))
        return
    import ray
    from ray.data import ActorPoolStrategy

    inline_small_arguments()
    cpus = int(ray.cluster_resources().get("CPU", 1))
    placed = place(cpus, gpus(), len(rows), _node_cpus(), measured)
    if placed.gpus:
        log.info("extraction: %s", placed)
    device = "cuda" if placed.gpus else "cpu"
    results = _dataset(rows).map(
        actor,
        fn_constructor_args=(*arguments, device, placed.threads, batch_size),
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=placed.actors,
            max_concurrent_calls_per_actor=CONCURRENT_SHARDS[device],
            enable_true_multi_threading=True,
        ),
        num_cpus=placed.threads,
        num_gpus=placed.gpus,
    )
    yield from _results(results)


def _results(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they arrive; UserError if none arrives for longer than Ray Data waits."""
    from ray.data.exceptions import ExecutionTimeoutError

    try:
        yield from dataset.iter_rows()
    except ExecutionTimeoutError as error:
        seconds = dataset.context.execution_no_progress_timeout_s
        raise UserError(
            f"no shard was finished for {seconds:g} s, and the job gave up; finished shards are kept. If a shard takes "
            "that long, lower cache.shard_size or raise RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S; else check that a CPU is free"
        ) from error


def _dataset(rows: Sequence[dict[str, Any]]) -> Any:
    import ray.data

    ray.data.DataContext.get_current().print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
    return ray.data.from_items(_carried(rows), override_num_blocks=len(rows))


def _carried(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with this thread's fields of log records."""
    carried = logs.row_context()
    return [{**row, **carried} for row in rows]
