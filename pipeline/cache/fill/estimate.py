"""Estimates before the cache is filled: bytes, device hours, and whether they fit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow.compute as pc
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.extract import out_of_memory
from pipeline.cache.fill.plan import CachePlan, SplitPlan
from pipeline.cache.fill.ray_pipeline import gpus
from pipeline.cache.fill.waves import staging_bytes
from pipeline.cache.layout.cached_teacher import CachedTeacher, projections_of, teacher_labels
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.keys import teacher_id
from pipeline.errors import UserError, blame_field
from pipeline.runtime.logs import only_errors
from teachers.base import Teacher, TeacherError, WeightsNotFoundError

ALTERNATIVES = ("float32", "float16", "int8", "pca-int8-zstd")
"""Codecs that a plan compares with the chosen one."""
GPU_MACS_PER_SECOND = {"float32": 4e12, "bfloat16": 62e12}
"""Assumed speed of a GPU if there is none to measure, by `cache.precision`: 40 % of the peak of an A100 (19.5 and
312 TFLOP/s in NVIDIA's data sheet)."""
CPU_PROBE_MACS = 50e9
"""About how many multiply-accumulates a batch of the probe has on a CPU: it takes seconds with any teacher."""
KEY_BYTES = 128
"""Upper bound for the keys of a row and its share of Parquet's own structures."""
SAMPLE_BYTES = 512
"""Upper bound for a sample in the files of a data set: its name, place, label and key."""
SHARD_BYTES = 8 << 10
"""Upper bound for a shard's record, the headers of its statistics, and what its Parquet file has but once."""


@dataclass(frozen=True)
class Probe:
    """Measured speed of a teacher.

    Attributes:
        device: name of the GPU, or ``cpu``.
        views_per_second: includes the copy of the features to the host.
        macs: multiply-accumulates per view.
        trained: whether the teacher's own weights were available; random ones take as long.
        memory: peak GPU memory in bytes, without CUDA's own; 0 on a CPU.
    """

    device: str
    views_per_second: float
    macs: int
    trained: bool
    memory: int = 0


@dataclass(frozen=True)
class TeacherEstimate:
    """Cost of one teacher.

    Attributes:
        view_bytes: bytes of one view by codec, for the chosen one and `ALTERNATIVES`.
        exact: codecs whose `view_bytes` are known or measured on shards; the others are upper bounds.
        views, missing: that the teacher is asked about, in all splits.
        share: of all views; 1 unless the recipe gives a smaller one.
        probe: None if the teacher cannot be created without its weights.
        hours: of this machine's device for the missing views, or None.
        gpu_hours: measured on a GPU, otherwise estimated from the multiply-accumulates (`GPU_MACS_PER_SECOND`); equals
            `hours` if there are none to count; or None.
        gpu_hours_per_view: the same of one view.
    """

    label: str
    codec: str
    view_bytes: dict[str, float]
    exact: frozenset[str]
    views: int
    missing: int
    probe: Probe | None
    hours: float | None
    gpu_hours: float | None
    share: float = 1.0
    gpu_hours_per_view: float | None = None


def estimate_cache(
    plan: CachePlan, config: CacheJobConfig, prober: Callable[[CachedTeacher, int], Probe | None] | None = None
) -> list[TeacherEstimate]:
    """Probe every teacher with the batch size, by default on this machine, and estimate its cost."""
    labels, prober = teacher_labels(plan.teachers), prober or probe_teacher
    return [_estimate(plan, t, labels[t.id], prober(t, config.cache.batch_size)) for t in plan.teachers]


def _estimate(plan: CachePlan, teacher: CachedTeacher, label: str, probe: Probe | None) -> TeacherEstimate:
    sizes = {codec: view_bytes(plan, teacher, codec) for codec in (teacher.codec, *ALTERNATIVES)}
    views = sum(split.missing_views(teacher) for split in plan.splits)
    hours = per_view = None
    if probe is not None:
        hours = views / probe.views_per_second / 3600
        counted = probe.macs / GPU_MACS_PER_SECOND[teacher.precision] / 3600
        per_view = counted if probe.device == "cpu" and probe.macs else 1 / probe.views_per_second / 3600
    return TeacherEstimate(
        label=label,
        codec=teacher.codec,
        view_bytes={codec: size for codec, (size, _) in sizes.items()},
        exact=frozenset(codec for codec, (_, exact) in sizes.items() if exact),
        views=sum(split.views(teacher) for split in plan.splits),
        missing=views,
        probe=probe,
        hours=hours,
        gpu_hours=None if per_view is None else views * per_view,
        share=teacher.share,
        gpu_hours_per_view=per_view,
    )


def view_bytes(plan: CachePlan, teacher: CachedTeacher, codec: str) -> tuple[float, bool]:
    """Bytes of a view with features in a codec, measured on shards if there are any; whether that is exact or an upper bound."""
    basis = teacher.config.basis if Codec.parse(codec).pca else None
    identity = teacher_id(teacher.spec, codec, teacher.precision, basis, teacher.decoder, teacher.share)
    other = replace(teacher, codec=codec, id=identity)
    known = [summary for split in plan.splits for summary in split.dataset.summaries(other.id)]
    if rows := sum(summary.rows for summary in known):
        return sum(summary.bytes for summary in known) / (teacher.share * rows), True
    return float(other.row_bytes()), codec in ("float32", "float16", "bfloat16", "int8")


def probe_teacher(cached: CachedTeacher, batch_size: int) -> Probe | None:
    """Time two batches of random pixels on this machine's device; the first one warms it up.

    Raises:
        UserError, TeacherError: if the GPU has too little memory, or the teacher cannot be created.
    """
    try:
        return _probe(cached, batch_size)
    except torch.OutOfMemoryError:
        reason = f"teacher {cached.spec.name}: {out_of_memory([cached], batch_size)}"
    raise UserError(reason)  # without the traceback, whose frames hold the GPU's memory


def _probe(cached: CachedTeacher, batch_size: int) -> Probe | None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loaded = _load(cached, device)
    if loaded is None:
        return None
    teacher, trained = loaded
    pixels = torch.randint(0, 256, (batch_size, cached.spec.channels, *cached.spec.input_size), dtype=torch.uint8)
    macs = count_macs(teacher, pixels[:1])
    if device == "cpu":
        pixels = pixels[: max(1, int(CPU_PROBE_MACS / max(1, macs)))]
    for _ in range(2):
        started = time.perf_counter()
        teacher.encode(pixels).patches.cpu()
        seconds = time.perf_counter() - started
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    memory = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    return Probe(name, len(pixels) / seconds, macs, trained, memory)


def probe_on_cluster(teacher: CachedTeacher, batch_size: int) -> Probe | None:
    """Probe a teacher on one of the cluster's GPUs, once one is free; without GPUs, probe it here."""
    import ray

    if not gpus():
        return probe_teacher(teacher, batch_size)
    return ray.get(ray.remote(num_gpus=1)(probe_teacher).remote(teacher, batch_size))


def count_macs(teacher: Teacher, pixels: torch.Tensor) -> int:
    """Multiply-accumulates of one forward."""
    from torch.utils.flop_counter import FlopCounterMode  # 100 MB of torch's compiler, which only a probe needs

    # The counter does not know the fused attention kernels; the plain form consists of matrix products.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            teacher.encode(pixels)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops() // 2)


def _load(cached: CachedTeacher, device: str) -> tuple[Teacher, bool] | None:
    """The teacher, and whether it has its own weights; if they are not available, random ones are as fast."""
    untrained = replace(cached, config=cached.config.model_copy(update={"weights": "random"}))
    for attempt, trained in ((cached, True), (untrained, False)):
        try:
            teacher = attempt.create()
            # Random weights are only timed here, which needs no warning.
            with only_errors("teachers"):
                teacher.load(device, getattr(torch, cached.precision))
            return teacher, trained
        except WeightsNotFoundError:
            continue
        except TeacherError:
            if trained:
                raise
    return None


def missing_bytes(*plans: CachePlan) -> int:
    """Upper bound of the bytes that filling the cache for these plans adds; what two of them share counts once.

    Images count with their size in the index; generated scenes have none there, and are small. Unopened archives count with
    their size, and what is staged of them at a time; features of their images as far as their number is expected.
    """
    splits = {split.dataset.store.uri: split for plan in plans for split in plan.splits}
    pairs = {
        (split.dataset.store.uri, split.dataset.policy.id, teacher.id): (split, teacher)
        for plan in plans
        for split in plan.splits
        for teacher in plan.teachers
    }
    features = sum(_missing_teacher_bytes(*pair) for pair in pairs.values())
    staged = max((staging_bytes(split.unopened) for split in splits.values()), default=0)
    return features + staged + sum(map(_missing_image_bytes, splits.values()))


def _missing_image_bytes(split: SplitPlan) -> int:
    lost = sum(
        (pc.sum(part.index()["size"].slice(shard * part.shard_size, part.shard_rows(shard))).as_py() or 0)
        for part, shard in split.dataset.missing_images()
    )
    beside = (split.new.num_rows + split.expected) * (KEY_BYTES + SAMPLE_BYTES)
    unopened = split.listing.expected[1] if split.listing.expected else split.unopened_bytes
    return int(lost + (pc.sum(split.new["size"]).as_py() or 0) + unopened + beside)


def _missing_teacher_bytes(split: SplitPlan, teacher: CachedTeacher) -> int:
    views = split.missing_views(teacher)
    if not views:
        return 0
    projections = projections_of(split.dataset.cache, teacher)
    rows = round(views / teacher.share)
    beside = side_bytes(teacher, 1, fitted=projections is not None) + side_bytes(teacher, _shards(split, rows))
    return views * teacher.row_bytes(projections) + rows * KEY_BYTES + beside


def _shards(split: SplitPlan, views: int) -> int:
    """Shards that this many views take, at most."""
    if not views:
        return 0
    size = min((part.shard_size for part in split.dataset.parts), default=512)
    return -(-views // (size * split.dataset.policy.rows_per_image)) + len(split.dataset.parts)


def side_bytes(teacher: CachedTeacher, shards: int, fitted: bool = True) -> int:
    """Upper bound of the bytes beside the features of some shards: records, statistics, and projections unless `fitted`."""
    channels = [shape[-1] for shape in teacher.shapes.values()]
    # Mean and deviation of every channel: in float32, and in 8 bits in the file of all shards that replaces those of each.
    statistics = shards * (SHARD_BYTES + sum(10 * size for size in channels))
    projections = 0 if fitted or not Codec.parse(teacher.codec).pca else sum(8 * size for size in channels)
    return statistics + projections + (2 * teacher.spec.patch_dim**2 if projections else 0)


def all_bytes(split: SplitPlan, teacher: CachedTeacher, row_bytes: float) -> int:
    """Upper bound of the bytes of all files of a teacher for a split, given those of a row of features."""
    components = [part.components for part in (projections_of(split.dataset.cache, teacher) or {}).values()]
    known = 2 * sum(part.numel() for part in components if part is not None)
    rows = split.images * split.dataset.policy.rows_per_image
    # One shard more, for the merged statistics and the teacher's description.
    beside = side_bytes(teacher, _shards(split, rows) + 1, fitted=bool(known)) + known
    return int(split.views(teacher) * row_bytes + rows * KEY_BYTES) + beside


def check_space(*plans: CachePlan) -> None:
    """Raise UserError if a local destination has too little free space, or the destination refuses a write."""
    store = plans[0].store
    free, need = store.free_bytes(), missing_bytes(*plans)
    if free is not None and need > free:
        raise UserError(
            f"{store.uri}: the missing shards take up to {need / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free: "
            "free space, set cache.uri to another place, or choose a smaller cache.codec (jobs/precompute.py --plan compares)"
        )
    if need:
        with blame_field("cache.uri"):
            store.check_writable()
