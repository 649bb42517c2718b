"""kNN over a bank of any size: each Ray actor holds a part of it and receives all queries.

Each of A actors holds 4 N D / A bytes of features, as much again for a normalised copy, and at most 256 MiB while it
compares (:func:`~pipeline.evaluate.knn.nearest`). The job holds the queries, 4 M D bytes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.scan import read_summaries
from pipeline.cache.read.shard_reader import NO_LABEL
from pipeline.evaluate.knn import Neighbours, labelled, merge, nearest, vote
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.ray_session import is_connected, worker_slots

BLOCK = 8192
"""Queries per call of an actor."""


class Placement(NamedTuple):
    """Number of actors, and CPUs and GPUs of each; 0 actors: in this process."""

    actors: int
    cpus: int = 1
    gpus: int = 0


class BankPart:
    """The labelled vectors of some shards of a bank, on a device."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher, shards: Sequence[int], device: str = "cpu") -> None:
        features, labels = read_summaries(dataset, teacher, shards=shards)
        known = labels != NO_LABEL
        self.features, self.labels, self.device = features[known].to(device), labels[known].to(device), device

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest vectors of this part, or all if it has fewer, to queries [M, D]; on the CPU."""
        near = nearest(self.features, self.labels, queries.to(self.device), k)
        return Neighbours(near.similarity.cpu(), near.labels.cpu())


def search_knn(
    train: Dataset,
    val: Dataset,
    teacher: CachedTeacher,
    ks: Sequence[int],
    temperature: float,
    placement: Placement | None = None,
) -> dict[int, float]:
    """Top-1 accuracy in percent on `val` for every k, with all of `train` as the bank.

    Args:
        placement: None: one actor per GPU of the Ray session, or per eight CPUs; in this process if that is a single actor
            without a GPU.

    Raises:
        UserError: if no image of `val` has a label.
    """
    queries, labels = labelled(*read_summaries(val, teacher))
    search = _searching(train, teacher, max(ks), placement or _placement(len(train.shards)))
    with ThreadPoolExecutor(1) as pool:  # searches the next block during the vote
        found = map_ahead(pool, search, queries.split(BLOCK), ahead=1)
        return vote(zip(found, labels.split(BLOCK), strict=True), ks, temperature)


def _searching(train: Dataset, teacher: CachedTeacher, k: int, placement: Placement) -> Callable[[Tensor], Neighbours]:
    if not placement.actors:
        whole = BankPart(train, teacher, range(len(train.shards)))
        return lambda queries: whole.search(queries, k)
    import ray

    remote: Any = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus)(BankPart)
    device = "cuda" if placement.gpus else "cpu"
    firsts = range(placement.actors)
    actors = [
        remote.remote(train, teacher, range(first, len(train.shards), placement.actors), device) for first in firsts
    ]

    def search(queries: Tensor) -> Neighbours:
        block = ray.put(queries)
        return merge(ray.get([actor.search.remote(block, k) for actor in actors]), k)

    return search


def _placement(shards: int) -> Placement:
    if not is_connected():
        return Placement(0)
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if gpus:
        return Placement(min(gpus, shards), 1, 1)
    actors = min((cpus - 1) // 8, worker_slots(8), shards)
    return Placement(actors, 8) if actors > 1 else Placement(0)
