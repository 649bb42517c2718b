"""Checks of stored features: they are finite, have their recorded statistics, and are what the teacher computes now."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.fill.statistics import dataset_moments, stored_rows
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.part_stats import STATISTICS
from pipeline.cache.layout.phi_s import PhiS, load_phi_s
from pipeline.cache.layout.shards import ShardFolder, ShardRecord, record_name
from pipeline.cache.layout.shares import with_features
from pipeline.cache.layout.stats import Moments, load_moments, merge_all
from pipeline.cache.layout.target import target_cosines
from pipeline.cache.maintain.checks import BrokenError, Shard, check_schema, features_schema, load_file
from pipeline.storage.store import DamagedError
from teachers.base import TeacherOutput

TOLERANCE = {"float32": 0.05, "bfloat16": 0.15}
"""Relative error allowed between features computed on two devices, by `cache.precision`.

One rounding costs 5e-4 (TF32, which cuDNN uses for float32) or 4e-3 (bfloat16), and a deep network accumulates dozens. Wrong
features differ by far more: unrelated vectors by 1.4 (sqrt 2), features of another image by 0.3 and more.
"""


def check_values(
    folder: ShardFolder, teacher: CachedTeacher, opened: Shard, codecs: Mapping[str, FeatureCodec]
) -> None:
    """Check that every stored value is finite, and that all together have the statistics taken before encoding."""
    check_schema(opened, features_schema(teacher, codecs))
    moments = check_moments(folder, opened.record, teacher)
    sums = {kind: _Sums(codec.shape[-1]) for kind, codec in codecs.items()}
    for table in map(opened.read_group, range(opened.file.num_row_groups)):
        for kind, codec in codecs.items():
            values, rows = decode(table[kind], codec), np.flatnonzero(with_features(table[kind]))
            finite = torch.isfinite(values).flatten(1).all(dim=1)
            if not finite.all():
                row = int(rows[int((~finite).nonzero()[0])])
                raise opened.broken(f"holds {kind} that are not finite, first of {table['key'][row].as_py().hex()}")
            sums[kind].add(values)
    for kind, total in sums.items():
        if total.count and kind in moments:
            loss = opened.fact("fidelity", kind, "relative_error")
            total.check(opened, kind, moments[kind], 2 * loss + TOLERANCE[teacher.precision])


def decode(column: pa.ChunkedArray, codec: FeatureCodec) -> Tensor:
    """The rows of a column that hold features, as these: [N, *shape] float32."""
    return codec.decode(stored_rows(column))


class _Sums:
    """Mean and mean square of stored values, to compare with the moments of the features before encoding.

    The root mean square of a difference bounds both the difference of the means and that of the root mean squares. The
    fidelity in a record is that of the shard's first batch; twice that loss is allowed for the whole shard.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(channels, dtype=torch.float64), 0.0

    def add(self, values: Tensor) -> None:
        flat = values.reshape(-1, len(self.sum)).double()
        self.count += len(flat)
        self.sum += flat.sum(dim=0)
        self.square += float(flat.square().sum())

    def check(self, opened: Shard, kind: str, moments: Moments, bound: float) -> None:
        if moments.count != self.count:
            raise BrokenError(opened.record.moments, f"counts {moments.count} {kind}, the shard holds {self.count}")
        size = _size(moments)
        drift = float(np.linalg.norm((self.sum / self.count).numpy() - moments.mean))
        drift = max(drift, abs(float(np.sqrt(self.square / self.count)) - size))
        if drift > bound * size:
            share = f"{drift / size:.3f}, the codec allows {bound:.3f}"
            raise opened.broken(f"holds {kind} unlike their statistics ({share})")


def check_moments(folder: ShardFolder, record: ShardRecord, teacher: CachedTeacher) -> Mapping[str, Moments]:
    """Check and return the statistics of a teacher's shard; nothing if `check_part_stats` finds them lost."""
    if not record.rows or not (record.moments or record.facts.get("fidelity") or teacher.share == 1):
        return {}
    if not record.moments:
        raise BrokenError(record_name(record.shard), "names no statistics")
    if folder.store.exists(record.moments):
        file, moments = record.moments, load_file(folder.store, record.moments, load_moments)
    else:
        try:
            file, moments = STATISTICS, {**folder.shard_moments(record)}
        except DamagedError:
            return {}
    if not _has_shapes(moments, teacher):
        raise BrokenError(file, f"does not hold the statistics of {' and '.join(teacher.shapes)}")
    if not all(np.isfinite(part.mean).all() and np.isfinite(part.std).all() for part in moments.values()):
        raise BrokenError(file, "holds statistics that are not finite")
    return moments


def check_statistics(dataset: Dataset, teacher: CachedTeacher) -> None:
    """Check that the statistics of a data set are those of its samples, and that PHI-S, if there is one, belongs to them.

    Shards recomputed on another device may have moved the statistics by `TOLERANCE`.

    Raises:
        DamagedError: if a shard is damaged.
    """
    store = dataset.statistics(teacher.id)
    frozen = load_file(store, "stats.npz", load_moments)
    rotations = load_file(store, "phi_s.npz", load_phi_s) if store.exists("phi_s.npz") else None
    due = merge_all(_fitting(dataset_moments(dataset, teacher), teacher))
    tolerance = TOLERANCE[teacher.precision]
    for kind in teacher.shapes:
        if kind not in frozen or not _alike(frozen[kind], due[kind], tolerance):
            raise BrokenError("stats.npz", f"does not hold the statistics of the shards' {kind}")
        if rotations is not None and not (kind in rotations and _fits(rotations[kind], frozen[kind], tolerance)):
            raise BrokenError("phi_s.npz", f"is no rotation with the mean and scale of the {kind} in stats.npz")


def _fitting(found: Iterable[Mapping[str, Moments]], teacher: CachedTeacher) -> Iterator[Mapping[str, Moments]]:
    for moments in found:
        if not _has_shapes(moments, teacher):
            raise DamagedError(f"a shard of {teacher.id} has statistics of other shapes")
        yield moments


def _has_shapes(moments: Mapping[str, Moments], teacher: CachedTeacher) -> bool:
    return {kind: part.mean.shape for kind, part in moments.items()} == {k: s[-1:] for k, s in teacher.shapes.items()}


def _alike(frozen: Moments, due: Moments, tolerance: float) -> bool:
    mean = np.linalg.norm(frozen.mean - due.mean) <= tolerance * _size(due)
    std = np.linalg.norm(frozen.std - due.std) <= tolerance * np.linalg.norm(due.std)
    return bool(frozen.count == due.count and mean and std)


def _size(moments: Moments) -> float:
    """Root mean square norm of the vectors."""
    return float(np.sqrt(np.sum(moments.std**2) + np.sum(moments.mean**2)))


def _fits(phi: PhiS, moments: Moments, tolerance: float) -> bool:
    """Whether PHI-S is orthogonal, and has the mean and scale of features whose stored form lost no more than they vary."""
    if phi.rotation.shape != (len(moments.mean),) * 2:
        return False
    mean = np.linalg.norm(phi.mean - moments.mean) <= (tolerance + 0.1) * np.linalg.norm(moments.std)
    scale = abs(phi.scale - np.sqrt(np.mean(moments.std**2))) <= (tolerance + 0.2) * phi.scale
    turn = phi.rotation @ phi.rotation.T
    return bool(mean and scale and np.allclose(turn, np.eye(len(turn)), atol=1e-3))


def compare(
    teacher: CachedTeacher,
    codecs: dict[str, FeatureCodec],
    opened: Shard,
    group: int,
    outputs: Sequence[TeacherOutput],
    frozen: Mapping[str, Moments],
) -> dict[str, Tensor]:
    """Compare a stored row group with what the teacher computes from the same pixels now.

    Returns:
        Cosines of the standardised features, [vectors] by token type, given the statistics of the dataset.

    By the triangle inequality, a row's relative error is at most the codec's loss on these features plus what the
    arithmetic of another device may change (`TOLERANCE`). The fidelity in the shard's record is a mean over other rows,
    and would raise false alarms on the rows that are hardest to encode.
    """
    stored, cosines = opened.read_group(group), {}
    for kind, codec in codecs.items():
        if not outputs:  # the teacher is asked about none of these images
            continue
        features: Tensor = torch.cat([getattr(output, kind) for output in outputs]).cpu()
        try:
            kept = codec.decode(torch.from_numpy(codec.encode(features)))
        except ValueError as error:
            raise opened.broken(f"cannot be compared: the teacher now computes {kind} {error}") from error
        found = decode(stored[kind], codec)
        loss = relative_errors(features, found)
        bound = relative_errors(features, kept) + TOLERANCE[teacher.precision]
        if wrong := (loss > bound).nonzero().flatten().tolist():
            first, allowed = float(loss[wrong[0]]), float(bound[wrong[0]])
            row = int(np.flatnonzero(with_features(stored[kind]))[wrong[0]])
            raise opened.broken(
                f"holds other {kind} than the teacher computes: {len(wrong)} of {len(loss)} recomputed rows differ, first "
                f"{stored['key'][row].as_py().hex()} view {stored['view'][row]} by {first:.3f}, allowed {allowed:.3f}"
            )
        if kind in frozen:
            mean, std = (torch.from_numpy(part.copy()) for part in (frozen[kind].mean, frozen[kind].std))
            cosines[kind] = target_cosines(features.flatten(0, -2), found.flatten(0, -2), mean, std)
    return cosines


def relative_errors(features: Tensor, kept: Tensor) -> Tensor:
    """Norm of the difference relative to that of the features, by row [N]; tiny norms count as a thousandth of the mean."""
    sizes = features.flatten(1).norm(dim=1)
    return (kept - features).flatten(1).norm(dim=1) / sizes.clamp_min(float(sizes.mean()) * 1e-3 + 1e-30)
