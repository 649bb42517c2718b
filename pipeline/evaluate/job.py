"""Evaluations of a frozen backbone under an MLflow run: cached features, then kNN or linear classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import CachePlan, SplitPlan, plan_splits
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_stats
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.scan import PatchReader, read_summaries
from pipeline.errors import UserError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.frozen import cached_encoder
from pipeline.evaluate.knn import check_splits, labelled
from pipeline.evaluate.knn_search import search_knn
from pipeline.evaluate.linear import Batches, LinearHeads, accuracies, shuffled, train_heads
from pipeline.evaluate.segmentation import confusions, count_batches, pixel_batches
from pipeline.runs.addresses import fetch_student
from pipeline.runs.folder import cache_store, work_folder
from pipeline.sources.label_maps import LabelMaps, open_label_maps
from pipeline.student.loading import load_student
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.run import Run
from pipeline.training.segmentation_scores import segmentation_scores

MAX_MAPS = 16
"""Maximum images per step of the segmentation probe; each contributes `PIXELS` samples."""


@dataclass(frozen=True)
class FrozenPlan:
    """The plan of an evaluation: images and features, the frozen backbone, and the MLflow run that trained it, if known."""

    cache: CachePlan
    encoder: CachedTeacher
    student_run: str | None = None

    @property
    def train(self) -> Dataset:
        """Training images."""
        return self.cache.splits[0].dataset

    @property
    def val(self) -> Dataset:
        """Held-out images."""
        return self.cache.splits[1].dataset


def plan_frozen(config: EvaluateJobConfig, grid: int | None = None) -> FrozenPlan:
    """Plan the features of `evaluate.student` on whole images, before anything expensive starts.

    Args:
        grid: as in :class:`~pipeline.evaluate.frozen.FrozenTeacher`; None: vectors, which need labelled images.

    Raises:
        UserError, TeacherError: if the student, the images or their labels do not suit the evaluation.
    """
    settings = config.evaluate
    if not settings.student:
        raise UserError(
            "evaluate.student must be given: an exported student folder, an MLflow model URI (models:/m-...), or a timm name"
        )
    if config.data.held_out is None:
        raise UserError("data.val: an evaluation needs held-out images")
    store = cache_store(config)
    splits = plan_splits(config, store)
    if grid is None:
        check_labels(splits)
    work = work_folder(config)  # which all nodes see
    source = fetch_student(settings.student, resolve_uri(config.tracking.uri, work), work)
    if (folder := Path(source).expanduser()).is_dir():
        source = str(folder.resolve())  # workers have another working directory
    student = load_student(source, weights=settings.weights, args=config.student.args)
    size = settings.input_size or student.input_size or config.student.input_size
    encoder = cached_encoder(source, size, weights=settings.weights, args=config.student.args, grid=grid)
    plan = FrozenPlan(
        CachePlan(store, splits, (encoder,), config.cache.shard_size), encoder, student.provenance.get("run_id")
    )
    check_splits(plan.train, plan.val)
    return plan


def check_labels(splits: Sequence[SplitPlan]) -> None:
    """Raise a UserError if a split has no labels; before its archives are read, it may have some."""
    for split in splits:
        if not split.labelled:
            raise UserError(f"data.{split.split}: {split.source.location} has no labels, which this evaluation needs")


def compute_features(plan: FrozenPlan, config: EvaluateJobConfig) -> FrozenPlan:
    """Compute the missing features on all nodes and GPUs of the Ray session."""
    cache, _ = build_cache(plan.cache, config)
    return replace(plan, cache=cache, encoder=cache.teachers[0])


def knn(plan: FrozenPlan, config: EvaluateJobConfig, run: Run, folder: Path) -> dict[str, float]:
    """Accuracy in percent for every k of `evaluate.ks`, as ``knn_<k>``, and of `knn.k`, as ``knn``."""
    check_labels(plan.cache.splits)
    ks = sorted({*config.evaluate.ks, config.knn.k})
    found = search_knn(plan.train, plan.val, plan.encoder, ks, config.knn.temperature)
    return {"knn": found[config.knn.k], **{f"knn_{k}": accuracy for k, accuracy in found.items()}}


def linear(plan: FrozenPlan, config: EvaluateJobConfig, run: Run, folder: Path) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of the best learning rate, and that rate; holds 4 N D bytes of both splits."""
    check_labels(plan.cache.splits)
    settings, device = config.evaluate, _device()
    (features, labels), (held_out, expected) = (
        [part.to(device) for part in labelled(*read_summaries(split, plan.encoder))] for split in (plan.train, plan.val)
    )
    batches = shuffled(features, labels, settings.batch_size, config.seed)
    steps = math.ceil(len(features) / settings.batch_size)
    heads = _train(plan, config, run, int(labels.max()) + 1, batches, steps, folder / "linear.pt")
    found = accuracies(heads, held_out, expected)
    best = _best(run, settings.lrs, found)
    return {"top1": found["top1"][best], "top5": found["top5"][best], "lr": settings.lrs[best]}


@dataclass(frozen=True)
class SplitMaps:
    """The label maps of both splits, and their number of classes."""

    train: LabelMaps
    val: LabelMaps
    classes: int

    @classmethod
    def of(cls, plan: FrozenPlan) -> SplitMaps:
        """Open and check all label maps; UserError names the first image without a matching one."""
        maps = {s.split: open_label_maps(s.source, s.sample_ids()) for s in plan.cache.splits}
        return cls(maps["train"], maps["val"], max(found.check() for found in maps.values()))


def seg_probe(
    plan: FrozenPlan, config: EvaluateJobConfig, run: Run, folder: Path, *, maps: SplitMaps
) -> dict[str, float]:
    """mIoU, mean and overall pixel accuracy in percent of the best learning rate, and that rate.

    Logs the intersection over union of every class as the artifact `iou.json`.
    """
    settings, device = config.evaluate, _device()
    groups = PatchReader(plan.train, plan.encoder)
    images = min(settings.batch_size, MAX_MAPS)
    batches = pixel_batches(groups, maps.train, images, config.seed, device)
    heads = _train(plan, config, run, maps.classes, batches, count_batches(groups, images), folder / "seg-probe.pt")
    matrices = confusions(heads, PatchReader(plan.val, plan.encoder), maps.val, maps.classes, device)
    scores, ious, _ = zip(*map(segmentation_scores, matrices), strict=True)
    found = {name: [means[name] for means in scores] for name in scores[0]}
    best = _best(run, settings.lrs, found)
    run.log_dict({"iou": [round(value, 3) for value in ious[best].tolist()]}, "iou.json")
    return {**scores[best], "lr": settings.lrs[best]}


def _train(
    plan: FrozenPlan, config: EvaluateJobConfig, run: Run, classes: int, batches: Batches, steps: int, state_file: Path
) -> LinearHeads:
    """Trained classifiers on features that are standardised by the statistics of the training images."""
    moments, lrs = teacher_stats(plan.train, plan.encoder)["patches"], config.evaluate.lrs
    mean, std = torch.from_numpy(moments.mean), torch.from_numpy(moments.std)
    heads = LinearHeads(mean, std, classes, lrs, config.seed).to(_device())

    def log_losses(epoch: int, losses: list[float]) -> None:
        run.log_metric_dict({f"loss/lr_{lr:g}": loss for lr, loss in zip(lrs, losses, strict=True)}, epoch)

    train_heads(heads, batches, steps, config.evaluate.epochs, state_file, log_losses)
    return heads


def _best(run: Run, lrs: Sequence[float], found: Mapping[str, list[float]]) -> int:
    """Index of the learning rate with the best first score; prints and logs all scores."""
    for number, lr in enumerate(lrs):
        scores = {name: values[number] for name, values in found.items()}
        print(f"learning rate {lr:<8g}" + "".join(f"{name} {score:7.2f} %  " for name, score in scores.items()))
        run.log_metric_dict({f"{name}/lr_{lr:g}": score for name, score in scores.items()})
    first = next(iter(found.values()))
    return first.index(max(first))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
