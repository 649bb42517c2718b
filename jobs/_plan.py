"""The plan of the cache as text: what exists, what is missing, and what it costs. Filling the cache of all phases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs._cli import grid, table
from pipeline.cache.config import CacheJobConfig, PrecomputeJobConfig, TeacherConfig
from pipeline.cache.fill.build import BuildReport
from pipeline.cache.fill.decoders import check_decoder
from pipeline.cache.fill.estimate import (
    TeacherEstimate,
    all_bytes,
    check_space,
    estimate_cache,
    missing_bytes,
    probe_on_cluster,
)
from pipeline.cache.fill.plan import CachePlan, SplitPlan, versions_of
from pipeline.cache.layout.cached_teacher import CachedTeacher, projections_of, teacher_fidelity, teacher_labels
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.target import TARGET_COSINE, TARGET_COSINE_P1
from pipeline.runs.folder import work_folder
from pipeline.runtime.ray_session import Hardware
from pipeline.runtime.units import size, time_span

if TYPE_CHECKING:  # it imports MLflow
    from pipeline.runs.session import Job

RESIZED = {"squash": "squashed to a square", "pad": "longest side resized, padded to a square"}


def print_plan(phase: PrecomputeJobConfig, plan: CachePlan, number: int, phases: int, *more: str) -> None:
    """Print the plan of a phase, numbered if there are several, and `more` text."""
    title = "plan" if phases == 1 else f"plan of phase {number} of {phases}"
    print(title, cache_plan(plan, phase), *more, sep="\n", flush=True)


def fill(job: Job, planned: Sequence[tuple[CacheJobConfig, CachePlan]]) -> list[tuple[CachePlan, BuildReport]]:
    """Compute the missing features of all phases; returns the filled plans."""
    from pipeline.cache.fill.job import precompute

    lacking = (t for _, plan in planned for t in plan.teachers if any(split.missing_views(t) for split in plan.splits))
    for decoder in {teacher.decoder for teacher in lacking}:
        check_decoder("cache.decoder", decoder)
    filled = []
    for number, (phase, plan) in enumerate(planned, 1):
        with job.child_run("precompute" if number == 1 else f"precompute-{number}") as tracked:
            filled.append(precompute(phase, plan, tracked))
    job.state.data = versions_of(*(plan for plan, _ in filled))
    job.state.save()
    return filled


def cache_plan(plan: CachePlan, config: PrecomputeJobConfig) -> str:
    """Datasets, teachers, shards and bytes."""
    rows: dict[str, str | None] = {"work folder": str(work_folder(config)), "cache": plan.store.uri}
    for split in plan.splits:
        dataset = split.dataset
        there = f"version {dataset.id}" if split.listing.is_known else _unread(split)
        bad = f"; {split.listing.bad.num_rows} that cannot be used" if split.listing.bad.num_rows else ""
        rows[f"{split.split} images"] = (
            f"{_count(split)} from {dataset.location}; view {dataset.policy.id}; {there}{bad}"
        )
        rows[f"{split.split} left out"] = "; ".join(split.left_out) or None
    labels = teacher_labels(plan.teachers)
    for teacher in plan.teachers:
        rows[f"teacher {labels[teacher.id]}"] = _teacher(plan, teacher)
    return table(rows)


def _count(split: SplitPlan) -> str:
    """The number of images, as far as known."""
    if split.is_counted:
        return str(split.images)
    return f"about {split.images}" if split.is_estimated else "an unknown number"


def _unread(split: SplitPlan) -> str:
    """What is still to be read."""
    phrases = [f"{split.new.num_rows} new or changed, still to be read"] if split.new.num_rows else []
    if count := len(split.unopened):
        kind = "Parquet file" if split.listing.expected else "tar"
        about = "" if split.listing.expected else "about "
        expected = f": {about}{split.expected} images" if split.is_estimated else ""
        archives = f"{count} new {kind}{'s' if count > 1 else ''}"
        phrases.append(f"{archives}, {size(split.unopened_bytes)}, not read before the job stores them{expected}")
    return ", ".join(phrases)


def uncounted(plan: CachePlan) -> str | None:
    """The images that all estimates lack."""
    names = [f"data.{split.split}" for split in plan.splits if not split.is_estimated]
    return f"the images of {' and '.join(names)}, whose tars are not read before the job stores them" if names else None


def _teacher(plan: CachePlan, teacher: CachedTeacher) -> str:
    spec = teacher.spec
    views = sum(split.views(teacher) for split in plan.splits)
    missing = min(views, sum(split.missing_views(teacher) for split in plan.splits))
    summary = "none" if spec.summary_dim is None else str(spec.summary_dim)
    computed = f", {spec.computation}" if spec.computation else ""
    asked = f"asked about {teacher.share:.4g} of the images; " if teacher.share < 1 else ""
    decoded = "" if teacher.decoder == "cpu" else f", decoded by {teacher.decoder}"
    return (
        f"{asked}{spec.input_size[0]}x{spec.input_size[1]} px -> {spec.grid[0]}x{spec.grid[1]}x{spec.patch_dim}, "
        f"summary {summary}; "
        f"{RESIZED[spec.resize_mode]}, {spec.interpolation}{decoded}{computed}; "
        f"weights {spec.weights[:20]}; {teacher.precision}, stored as {teacher.codec}: {_stored(plan, teacher)}; "
        f"{teacher.id}: {views - missing} of {views} views cached"
    )


def _stored(plan: CachePlan, teacher: CachedTeacher) -> str:
    """Bytes per view, at most, and of all files in total; and the fidelity of what is stored, or what it is chosen for."""
    row = teacher.row_bytes(projections_of(plan.store, teacher))
    total = sum(all_bytes(split, teacher, row) for split in plan.splits)
    return f"at most {size(row)} per view, {size(total)} in total{_fidelity(plan, teacher)}"


def _fidelity(plan: CachePlan, teacher: CachedTeacher) -> str:
    figures = [teacher_fidelity(split.dataset, teacher)["patches"] for split in plan.splits]
    if known := [found for found in figures if "target_cosine" in found]:
        mean, low = (min(found[name] for found in known) for name in ("target_cosine", "target_cosine_p1"))
        return f", cosine of the standardised patches {mean:.3f}, 1st percentile {low:.3f}"
    codec = Codec.parse(teacher.codec)
    if codec.pca and codec.components is None and not any(figures):
        return f", chosen for a cosine of the standardised patches of {TARGET_COSINE:g}, 1st percentile {TARGET_COSINE_P1:g}"
    return ", cosine of the standardised patches not measured"


def print_costs(
    planned: Sequence[tuple[PrecomputeJobConfig, CachePlan]], cluster: Hardware | None = None
) -> dict[str, Any]:
    """Probe the teachers of all phases, print what filling the cache costs, and return the figures.

    Raises:
        UserError: if the cache cannot fit.
    """
    teachers, rates, estimated = [], [], []
    for phase, plan in planned:
        estimates = estimate_cache(plan, phase, probe_on_cluster if cluster else None)
        print(cost_plan(plan, phase, estimates, cluster), flush=True)
        teachers += estimates
        estimated.append((phase, plan, estimates))
        rates.append(read_rate(plan, phase, estimates))
    if saved := left_to_some_caches(estimated):
        print("teachers that not all caches have", table(saved), sep="\n", flush=True)
    plans = [plan for _, plan in planned]
    check_space(*plans)
    hours = sum_known(teacher.gpu_hours for teacher in teachers)
    return {
        "views_missing": sum(teacher.missing for teacher in teachers),
        "missing_bytes": missing_bytes(*plans),
        "unopened_bytes": max(sum(split.unopened_bytes for split in plan.splits) for plan in plans),
        "free_bytes": plans[0].store.free_bytes(),
        "bytes_per_view": {teacher.label: teacher.view_bytes for teacher in teachers},
        "gpu_hours": hours,
        "gpu_memory_bytes": {teacher.label: teacher.probe.memory for teacher in teachers if teacher.probe},
        "cluster": cluster and asdict(cluster),
        "price": None if hours is None else hours * planned[0][0].plan.gpu_hour_price,
        "read_bytes_per_second": max(rates),
    }


def cost_plan(
    plan: CachePlan, config: PrecomputeJobConfig, teachers: Sequence[TeacherEstimate], cluster: Hardware | None = None
) -> str:
    """Device hours, price, read rate and space, also with other codecs; on a cluster, its GPUs and hours."""
    times = grid([*(_times(teacher, config) for teacher in teachers), _total(teachers, config)])
    codecs = grid([*map(_codecs, teachers)])
    free = plan.store.free_bytes()
    rows = {
        "not counted": uncounted(plan),
        "still to be written": f"at most {size(missing_bytes(plan))}",
        "free": "unknown" if free is None else f"{size(free)} at {plan.store.uri}",
        "to read": f"{size(read_rate(plan, config, teachers))}/s for plan.images_per_second="
        f"{config.plan.images_per_second:g}",
        "cluster": cluster and _on_cluster(cluster, teachers),
        **{
            f"share of {teacher.label}": f"{teacher.share:g} saves {_cost(teacher, teacher.views * (1 / teacher.share - 1))}"
            for teacher in teachers
            if teacher.share < 1
        },
    }
    return "\n".join(["time", times, "bytes per view (<: at most)", codecs, "space", table(rows)])


def left_to_some_caches(
    planned: Sequence[tuple[PrecomputeJobConfig, CachePlan, Sequence[TeacherEstimate]]],
) -> dict[str, str]:
    """What teachers save that some caches (of phases, in their order) lack: their cost on the views of each of these."""
    rows = {}
    for _, plan, estimates in planned:
        for teacher, estimate in zip(plan.teachers, estimates, strict=True):
            for number, (config, other, _) in enumerate(planned, 1):
                if any(_same(asked, teacher.config) for asked in config.teachers):
                    continue
                own = {(split.dataset.store.uri, split.dataset.policy.id) for split in plan.splits}
                views = sum(
                    split.views(teacher)
                    for split in other.splits
                    if (split.dataset.store.uri, split.dataset.policy.id) not in own
                )
                if views:
                    rows[f"{estimate.label}, not in cache {number}"] = f"saves {_cost(estimate, views)}"
    return rows


def _same(one: TeacherConfig, other: TeacherConfig) -> bool:
    """Whether two phases ask the same teacher, at whatever resolution."""
    return (one.model, one.weights, one.args) == (other.model, other.weights, other.args)


def _cost(teacher: TeacherEstimate, views: float) -> str:
    """What it takes to compute and to store so many views."""
    hours = None if teacher.gpu_hours_per_view is None else views * teacher.gpu_hours_per_view
    bound = "" if teacher.codec in teacher.exact else "at most "
    return f"{views:.0f} views, {span(hours)} on a GPU, {bound}{size(views * teacher.view_bytes[teacher.codec])}"


def _on_cluster(cluster: Hardware, teachers: Sequence[TeacherEstimate]) -> str:
    if not cluster.gpus:
        return f"{cluster}: teachers run on CPUs"
    total = sum_known(teacher.gpu_hours for teacher in teachers)
    return f"{cluster}: {span(total and total / cluster.gpus)} on all GPUs"


def _times(teacher: TeacherEstimate, config: PrecomputeJobConfig) -> dict[str, str]:
    probe = teacher.probe
    speed = "no weights, not probed" if probe is None else f"{probe.views_per_second:.1f} views/s on {probe.device}"
    counted = probe is not None and probe.device == "cpu" and probe.macs
    gpu = f" ({probe.macs / 1e9:.2f} GMACs at 40 % of an A100)" if probe and counted else ""
    return {
        "teacher": teacher.label,
        "views missing": f"{teacher.missing} of {teacher.views}",
        "measured": speed + ("" if probe is None or probe.trained else ", random weights"),
        "time here": span(teacher.hours),
        "time on a GPU": span(teacher.gpu_hours) + gpu,
        "price": _price(teacher.gpu_hours, config),
        "GPU memory": size(probe.memory) if probe and probe.memory else "not measured",
    }


def _total(teachers: Sequence[TeacherEstimate], config: PrecomputeJobConfig) -> dict[str, str]:
    """The last row: what all teachers take, one after the other; unknown if that of one of them is."""
    here, gpu = (sum_known(getattr(teacher, name) for teacher in teachers) for name in ("hours", "gpu_hours"))
    views = f"{sum(teacher.missing for teacher in teachers)} of {sum(teacher.views for teacher in teachers)}"
    times = {"time here": span(here), "time on a GPU": span(gpu), "price": _price(gpu, config)}
    return {"teacher": "all", "views missing": views, "measured": "", **times, "GPU memory": ""}


def sum_known(values: Iterable[float | None]) -> float | None:
    """The sum; None if one of the values is not known."""
    known = [*values]
    return None if None in known else sum(value for value in known if value is not None)


def span(value: float | None) -> str:
    """Hours in words."""
    return "unknown" if value is None else time_span(3600 * value)


def _price(gpu_hours: float | None, config: PrecomputeJobConfig) -> str:
    return "unknown" if gpu_hours is None else f"{gpu_hours * config.plan.gpu_hour_price:.2f}"


def _codecs(teacher: TeacherEstimate) -> dict[str, str]:
    sizes = {
        codec + (" (chosen)" if codec == teacher.codec else ""): ("" if codec in teacher.exact else "<") + size(count)
        for codec, count in teacher.view_bytes.items()
    }
    return {"teacher": teacher.label, **sizes}


def read_rate(plan: CachePlan, config: PrecomputeJobConfig, teachers: Sequence[TeacherEstimate]) -> float:
    """Bytes per second that a training at `plan.images_per_second` reads: images and all features."""
    image = plan.splits[0].image_bytes
    features = sum(teacher.share * teacher.view_bytes[teacher.codec] for teacher in teachers)
    return float(config.plan.images_per_second * (image + features))
