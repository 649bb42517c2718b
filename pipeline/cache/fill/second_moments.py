"""The PHI-S rotation of a teacher, from the covariance of the stored features, for trainings that standardise by it.

No shard keeps second moments: a matrix [D, D] takes more bytes than the features of some hundred images. They are summed from
the shards, part by part, when the first training asks for the rotation, which is then frozen beside the statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.phi_s import PhiS, dump_phi_s
from pipeline.cache.layout.shards import ShardRecord, fixed_width
from pipeline.cache.layout.stats import Moments, MomentSums, merge_all
from pipeline.runtime.prefetch import map_ahead

PART = 16
"""Shards whose second moments are summed by one task, in float64, before they are sent."""

log = logging.getLogger(__name__)


def freeze_phi_s(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Compute and store the PHI-S rotation of a complete teacher, unless that was done.

    Raises:
        UserError: if a shard is missing or damaged.
    """
    store = dataset.teacher(teacher.id).store
    if store.exists("phi_s.npz"):
        return
    log.info("%s: summing the second moments of the features for PHI-S", store.uri)
    records = [record for record in dataset.records(dataset.teacher(teacher.id)).values() if record.rows]
    parts = [records[first : first + PART] for first in range(0, len(records), PART)]
    merged = merge_all(_summed(dataset, teacher, parts))
    codecs = load_codecs(dataset, teacher)
    rotations = {kind: PhiS.of(decoded_moments(codecs[kind], part)) for kind, part in merged.items()}
    store.put("phi_s.npz", dump_phi_s(rotations))


def _summed(dataset: Dataset, teacher: CachedTeacher, parts: list[list[ShardRecord]]) -> Iterator[dict[str, Moments]]:
    """The second moments of each part, in order; as tasks of one CPU if there are several and a Ray session is connected."""
    import ray

    if len(parts) == 1 or not ray.is_initialized():
        yield from (sum_part(dataset, teacher, part) for part in parts)
        return
    task, ahead = ray.remote(num_cpus=1)(sum_part), max(1, int(ray.cluster_resources().get("CPU", 1)))
    place: Callable[[list[ShardRecord]], dict[str, Moments]] = lambda part: ray.get(task.remote(dataset, teacher, part))  # noqa: E731
    with ThreadPoolExecutor(ahead) as pool:
        try:
            yield from map_ahead(pool, place, parts, ahead)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def sum_part(dataset: Dataset, teacher: CachedTeacher, records: list[ShardRecord]) -> dict[str, Moments]:
    """Count, mean and scatter matrix by token type of the values in these shards, as stored, before `decoded_moments`."""
    folder, codecs = dataset.teacher(teacher.id), load_codecs(dataset, teacher)
    sums = {kind: MomentSums(outer=True) for kind in codecs}
    for record in records:
        table = folder.read(record, list(codecs))
        for kind, codec in codecs.items():
            rows = torch.from_numpy(fixed_width(table[kind]).copy())
            for part in rows.split(folder.row_group_size):  # a shard of float32 values may take gigabytes
                sums[kind].add(codec.stored_values(part))
    return {kind: part.moments() for kind, part in sums.items()}


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
