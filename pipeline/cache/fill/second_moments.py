"""The PHI-S rotation of a teacher, from the covariance of the stored features, for trainings that standardise by it.

No shard keeps second moments: a matrix [D, D] takes more bytes than the features of some hundred images. They are summed from
the shards, batch by batch, when the first training asks for the rotation, which is then frozen beside the statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.cache.fill.statistics import needed_records, selected_features
from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.phi_s import PhiS, dump_phi_s
from pipeline.cache.layout.shards import ShardRecord
from pipeline.cache.layout.stats import Moments, MomentSums, merge_all
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.ray_session import is_connected

BATCH = 16
"""Shards whose second moments are summed by one task, in float64, before they are sent."""
Shards = list[tuple[int, ShardRecord]]
"""Records of shards, with the numbers of their parts."""

log = logging.getLogger(__name__)


def freeze_phi_s(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Compute and store the PHI-S rotation of a complete teacher, unless that was done.

    Raises:
        UserError: if a shard is missing or damaged.
    """
    store = dataset.statistics(teacher.id)
    if store.exists("phi_s.npz"):
        return
    log.info("%s: summing the second moments of the features for PHI-S", store.uri)
    records = [
        (number, record) for number in range(len(dataset.parts)) for record in needed_records(dataset, number, teacher)
    ]
    batches = [records[first : first + BATCH] for first in range(0, len(records), BATCH)]
    merged = merge_all(part for part in _summed(dataset, teacher, batches) if part)
    codecs = load_codecs(dataset.cache, teacher)
    rotations = {kind: PhiS.of(decoded_moments(codecs[kind], part)) for kind, part in merged.items()}
    store.put("phi_s.npz", dump_phi_s(rotations))


def _summed(dataset: Dataset, teacher: CachedTeacher, batches: list[Shards]) -> Iterator[dict[str, Moments]]:
    """The second moments of each batch, in order; as tasks of one CPU if there are several and a Ray session is connected."""
    if len(batches) == 1 or not is_connected():
        yield from (sum_shards(dataset, teacher, batch) for batch in batches)
        return
    import ray

    task, ahead = ray.remote(num_cpus=1)(sum_shards), max(1, int(ray.cluster_resources().get("CPU", 1)))
    place: Callable[[Shards], dict[str, Moments]] = lambda batch: ray.get(task.remote(dataset, teacher, batch))  # noqa: E731
    with ThreadPoolExecutor(ahead) as pool:
        try:
            yield from map_ahead(pool, place, batches, ahead)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def sum_shards(dataset: Dataset, teacher: CachedTeacher, records: Shards) -> dict[str, Moments]:
    """Count, mean and scatter matrix by token type of the samples' values in these shards, as stored, before `decoded_moments`;
    nothing if there are none.
    """
    codecs = load_codecs(dataset.cache, teacher)
    sums = {kind: MomentSums(outer=True) for kind in codecs}
    for number, record in records:
        for kind, rows in selected_features(dataset, number, teacher, record, codecs):
            sums[kind].add(codecs[kind].stored_values(rows))
    return {kind: part.moments() for kind, part in sums.items()} if all(part.count for part in sums.values()) else {}


def decoded_moments(codec: FeatureCodec, stored: Moments) -> Moments:
    """Moments of the features, given those of their stored values; the matrix of stored values is smaller."""
    if codec.mean is None or codec.scale is None:
        return stored
    mean = codec.mean.double().numpy()
    if codec.basis is None:
        scale = codec.scale.double().numpy()
        return Moments(stored.count, mean + stored.mean * scale, stored.scatter * scale * scale[:, None])
    basis = codec.basis.double().numpy()
    return Moments(stored.count, mean + stored.mean @ basis, basis.T @ stored.scatter @ basis)
