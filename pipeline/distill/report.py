"""The report of a distillation: what went in, what came out, and how to use it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from PIL import Image

from pipeline.cache.config import ViewsConfig
from pipeline.cache.fill.build import BuildReport
from pipeline.cache.fill.job import image_bytes, teacher_bytes
from pipeline.cache.fill.plan import CachePlan
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_fidelity, teacher_labels
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.examples import read_examples
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.figures import enlarge, features_columns
from pipeline.distill.job import DistillResult
from pipeline.distill.mixed import first_batch
from pipeline.distill.task import DistillJob, HeldOut, build_reader
from pipeline.evaluate.chance import chance, class_counts, interval
from pipeline.imaging.decode import decode_image
from pipeline.report.chart import Chart, Line
from pipeline.report.curves import Curves, by_epoch, read_curves
from pipeline.report.pictures import Picture, picture
from pipeline.report.report import Card, Report, Section
from pipeline.runs.session import Job
from pipeline.runs.usage import loading_lines
from pipeline.runtime.ray_session import devices
from pipeline.runtime.units import counted, size, time_span
from pipeline.training.config import TrainConfig

EXAMPLES, EXAMPLE_SIDE = 12, 128
"""Images of the data that are shown, and their longest side in pixels."""


@dataclass(frozen=True)
class Filled:
    """The filled caches of all phases and input sizes, and what filling them did."""

    plans: Sequence[CachePlan]
    reports: Sequence[BuildReport]


@dataclass(frozen=True)
class HeldOutLabels:
    """The labelled held-out images: how many there are, and the accuracy of always naming the most frequent class."""

    images: int
    chance: float

    @classmethod
    def of(cls, job: DistillJob) -> "HeldOutLabels | None":
        """None if kNN is not measured."""
        counts = class_counts(job.val) if job.val else {}
        return cls(sum(counts.values()), chance(counts)) if counts else None

    def show(self, percent: float | None) -> str:
        """An accuracy with its interval."""
        if percent is None:
            return ""
        low, high = interval(percent, self.images)
        return f"{percent:.1f} % ({low:.1f} to {high:.1f})"


def distill_report(
    job: Job, config: DistillJobConfig, result: DistillResult, filled: Filled, figures: Mapping[str, Any]
) -> Report:
    """The report of a finished distillation.

    Args:
        figures: of the job, as it logs and prints them.
    """
    curves = read_curves(job.state.folder / "metrics.jsonl")
    labels = HeldOutLabels.of(result.jobs[-1])
    sections = (
        _recipe(config, result.jobs[-1].config.train),
        _data(result.jobs, filled),
        _teachers(result, filled, labels),
        Section("Curves", _curves_lead(labels), charts=tuple(_charts(curves, result, labels))),
        _pictures(result),
        _cache(filled),
        _cost(job, config, filled, figures),
        Section("Load the student", code=loading_lines(result.student), facts={"model in MLflow": result.model_uri}),
    )
    run = f"run {job.run.run_id} in {job.tracking_uri} · {job.state.folder}"
    return Report(config.title(job.name), "distillation", run, tuple(_cards(result, figures, labels)), sections)


def _cards(result: DistillResult, figures: Mapping[str, Any], labels: HeldOutLabels | None) -> Iterator[Card]:
    if labels and result.knn_after is not None and result.knn_before is not None:
        low, high = interval(result.knn_after, labels.images)
        note = (
            f"{low:.1f} to {high:.1f} % on {labels.images} held-out images; {result.knn_before:.1f} % before training"
        )
        yield Card("kNN of the student", f"{result.knn_after:.1f} %", note)
        best = max(result.teacher_knn, key=lambda name: result.teacher_knn[name])
        yield Card("best teacher", f"{result.teacher_knn[best]:.1f} %", f"kNN of {best}")
    if cost := result.cost:
        yield Card("student", f"{counted(cost['parameters'])}", f"parameters; {counted(cost['macs'])} MACs per image")
    yield Card("images seen", counted(result.samples), f"in {result.steps} steps")
    yield Card(
        "cached features", size(figures["cache_bytes"]), f"{figures['shards_computed']} shards were computed now"
    )
    yield Card("time", time_span(figures["seconds"]), "of the last start")


def _recipe(config: DistillJobConfig, train: TrainConfig) -> Section:
    """What the run was asked for; `train`: of the last phase, with the batch size that it had."""
    loss, views = config.loss, config.views
    facts = {
        "student": f"{config.student.name} at {config.student.input_size} px, from {config.student.weights} weights",
        "training": f"{train.epochs} epochs, {train.batch_size} images per step, seed {config.seed}",
        "learning rate": train.lr_rule,
        "loss of patches": _weights(loss.patches),
        "loss of summaries": _weights(loss.summary),
        "targets": f"standardised by {loss.standardise}",
        "views": f"{views.crops} crops, area from {views.min_area:g}{_changes(views)}"
        if views.crops
        else "the whole image",
    }
    if config.resolutions:
        facts["in each step"] = "; ".join(f"{r.share:.0%} at {r.input_size} px" for r in config.resolutions)
    if len(phases := config.phase_configs()) > 1:
        facts["phases"] = "; ".join(
            f"{number}: {phase.train.epochs} epochs at {phase.student.input_size} px"
            for number, phase in enumerate(phases, 1)
        )
    folded = {
        "Fields that are not at their defaults": _yaml(config.decisive()),
        "All fields": _yaml(config.model_dump(mode="json")),
    }
    return Section("Recipe", facts=facts, folded=folded)


def _changes(views: ViewsConfig) -> str:
    """The photometric changes and Mixup of the views that are not at their defaults."""
    changes = views.photometric.decisive() | ({"mixup": views.mixup} if views.mixup else {})
    return f"; {_weights(changes)}" if changes else ""


def _weights(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in losses.items())


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False)


def _data(jobs: Sequence[DistillJob], filled: Filled) -> Section:
    used = {(split, data.id): data for job in jobs for split, data in _splits(job).items()}
    header = ("", "images", "with a label", "classes", "most and least frequent class", "location", "version")
    rows = [
        (split, str(data.count), str(data.labelled), str(len(data.classes)), _frequent(data), data.location, data.id)
        for (split, _), data in used.items()
    ]
    bad = sum(len(samples) for report in filled.reports for samples in report.quarantined.values())
    lead = f"Examples of the training images.{f' {bad} images cannot be read and are left out.' if bad else ''}"
    return Section("Data", lead, table=(header, *rows), examples=_examples(jobs[-1].train))


def _splits(job: DistillJob) -> dict[str, Dataset]:
    return {"training": job.train, **({"held out": job.held_out} if job.held_out else {})}


def _frequent(data: Dataset) -> str:
    counts = class_counts(data)
    if not counts or not data.classes:
        return ""
    first, *_, last = (*counts, *counts)
    named = (f"{data.classes[label]} ({counts[label]})" for label in (first, last))
    return ", ".join(dict.fromkeys(named))


def _examples(data: Dataset) -> tuple[Picture, ...]:
    found = []
    for example in read_examples(data, EXAMPLES):
        image = decode_image(example.image)
        name = example.name.rpartition("/")[2]
        caption, detail = (example.label, name) if example.label else (name, "")
        found.append(picture(image, caption, f"{detail} {image.width}x{image.height}".strip(), EXAMPLE_SIDE))
    return tuple(found)


def _teachers(result: DistillResult, filled: Filled, labels: HeldOutLabels | None) -> Section:
    header = ("teacher", "kNN (95 % interval)", "weights", "licence", "input", "patches", "summary", "in the loss")
    table = [(*header, "stored as", "cosine of what is stored", "in the cache")]
    stored = teacher_bytes(*filled.plans)
    used = _used_teachers(filled)
    # Of teachers of one name, at two input sizes in two phases, kNN is that of the last.
    latest = {name: teacher for job in result.jobs for teacher, name in teacher_labels(job.teachers).items()}
    for name, teacher, plan in used:
        spec = teacher.spec
        fidelity = teacher_fidelity(plan.splits[0].dataset, teacher)["patches"].get("target_cosine")
        table.append(
            (
                name,
                labels.show(result.teacher_knn.get(name)) if labels and latest.get(name) == teacher.id else "",
                spec.weights[:20],
                spec.licence,
                f"{spec.input_size[0]}x{spec.input_size[1]} px",
                f"{spec.grid[0]}x{spec.grid[1]} of {spec.patch_dim}",
                "none" if spec.summary_dim is None else str(spec.summary_dim),
                str(teacher.config.weight),
                teacher.codec,
                "" if fidelity is None else f"{fidelity:.3f}",
                size(stored[teacher.id]),
            )
        )
    lead = (
        "kNN of a teacher is that of its cached features, with the same images and neighbours as that of the student."
    )
    return Section("Teachers", lead if labels else "", table=tuple(table))


def _used_teachers(filled: Filled) -> list[tuple[str, CachedTeacher, CachePlan]]:
    """Label, teacher and plan of every teacher, each once, as the first cache has it."""
    found: dict[str, tuple[str, CachedTeacher, CachePlan]] = {}
    for plan in filled.plans:
        for teacher in plan.teachers:
            found.setdefault(teacher.id, (teacher_labels(plan.teachers)[teacher.id], teacher, plan))
    return [*found.values()]


def _curves_lead(labels: HeldOutLabels | None) -> str:
    if labels is None:
        return "There is no kNN, which needs labels of training and held-out images."
    return (
        f"The band is the 95 % interval of {labels.images} held-out images (Wilson); it does not cover the choice of the "
        "seed. Chance is the accuracy of always naming the most frequent class."
    )


def _charts(curves: Curves, result: DistillResult, labels: HeldOutLabels | None) -> Iterator[Chart]:
    if labels and (knn := by_epoch(curves, "knn")):
        band = tuple((epoch, *interval(value, labels.images)) for epoch, value in knn)
        raw = by_epoch(curves, "knn_raw")
        lines = [Line("averaged weights", knn, band, last=f"{knn[-1][1]:.1f} %")]
        lines += [Line("raw weights", raw, last=f"{raw[-1][1]:.1f} %")] if raw else []
        levels = {**{f"teacher {name}": score for name, score in result.teacher_knn.items()}, "chance": labels.chance}
        lines += [_level(name, score, knn) for name, score in levels.items()]
        yield Chart("kNN accuracy on held-out images", "epoch", "kNN accuracy, %", tuple(lines))
    if cosines := _family(curves, "val_cosine/"):
        caption = "Mean cosine of predicted and standardised teacher features, of patches and summaries; 1 is equal."
        yield Chart("Cosine to the teachers on held-out images", "epoch", "cosine", cosines, caption)
    if ious := _family(curves, "val_mask_iou/"):
        caption = "Mean IoU of the masks that SAM's decoder makes of the student's and of SAM's embedding under the same prompts."
        yield Chart("SAM's masks on held-out images", "epoch", "IoU", ious, caption)
    if loss := by_epoch(curves, "loss"):
        parts = [line for line in _family(curves, "loss/") if not line.name.endswith(("/kept", "/mask_iou"))]
        total = Line("total", loss, last=f"{loss[-1][1]:.3g}")
        yield Chart("Training loss", "epoch", "loss", (total, *parts))


def _family(curves: Curves, prefix: str) -> tuple[Line, ...]:
    names = sorted(name for name in curves if name.startswith(prefix))
    points = {name.removeprefix(prefix): by_epoch(curves, name) for name in names}
    return tuple(Line(name, line, last=f"{line[-1][1]:.3g}") for name, line in points.items())


def _level(name: str, value: float, over: Sequence[tuple[float, float]]) -> Line:
    points = ((over[0][0], value), (over[-1][0], value))
    return Line(name, points, dashed=True, last=f"{value:.1f} %")


def _pictures(result: DistillResult) -> Section:
    job = result.jobs[-1]
    if job.held_out:
        side = job.config.student.input_size
        held_out = HeldOut(job.held_out, job.teachers, side, job.config.knn.batch_size)
        batch, codecs = next(held_out.batches()), held_out.codecs
    else:
        batch, codecs = first_batch(build_reader(job)), None
    columns = []
    for name, pictures in features_columns(result.distiller, batch, codecs).items():
        pixels = (enlarge(pictures) * 255).round().byte().numpy()
        columns.append(picture(Image.fromarray(pixels), name))
    whose = "held-out" if job.held_out else "training"
    lead = (
        f"Patch features of {whose} images, a row each. Equal colours mean equal features within the two columns of a teacher: "
        "its own features, and the student's prediction of them. The colours of a teacher are the first three principal "
        "components of its features over all rows, by direction, so that no single patch decides them. The last column, the "
        "student's own feature map, has colours of its own."
    )
    return Section("Features as colours", lead, columns=tuple(columns))


def _cache(filled: Filled) -> Section:
    stored = teacher_bytes(*filled.plans)
    labels = {
        t.id: name for plan in filled.plans for t in plan.teachers for name in [teacher_labels(plan.teachers)[t.id]]
    }
    images = image_bytes(*filled.plans)
    total = sum(stored.values()) + images
    rows = [(f"features of {labels[teacher]}", count) for teacher, count in stored.items()]
    rows = [*sorted(rows, key=lambda row: -row[1]), ("images, names and labels", images), ("all", total)]
    table = tuple((name, size(count), f"{count / total:.0%}") for name, count in rows)
    return Section("Cache", f"In {filled.plans[0].store.uri}.", table=(("", "size", "share"), *table))


def _cost(job: Job, config: DistillJobConfig, filled: Filled, figures: Mapping[str, Any]) -> Section:
    gpus, kind = devices()
    earlier, seconds = job.state.hours * 3600, float(figures["seconds"])
    filling = sum(report.seconds for report in filled.reports)
    facts = {
        "device": kind,
        "time of this start": time_span(seconds),
        **({"time of earlier starts": time_span(earlier)} if earlier else {}),
        "of which filling the cache": f"{time_span(filling)} for {figures['shards_computed']} shards",
    }
    if gpus or job.state.gpu_hours:
        spent = job.state.gpu_hours + gpus * seconds / 3600
        price = spent * config.plan.gpu_hour_price
        facts["GPU hours"] = f"{spent:.3g}, {price:.2f} at plan.gpu_hour_price={config.plan.gpu_hour_price:g}"
    return Section("Cost", facts=facts)
