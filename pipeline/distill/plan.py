"""The plan of a distillation: what will be trained and measured, and whether it can be. Does not import MLflow."""

import logging
from collections.abc import Sequence

from pipeline.cache.fill.plan import CachePlan
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.codec import Codec
from pipeline.cache.read.order import check_per_step
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import feature_map_size
from pipeline.distill.grid import GridRule
from pipeline.distill.loss import check_losses
from pipeline.distill.mixed import divide_batch
from pipeline.distill.phases import Phase
from pipeline.distill.sam_decoders import check_mask_teachers, makes_masks
from pipeline.distill.task import DistillJob, Resolution, build_student
from pipeline.errors import UserError
from pipeline.imaging.gpu_decode import NO_MIXUP
from pipeline.training.ray_train import count_shares
from pipeline.training.task import check_best_metric

log = logging.getLogger(__name__)


def views_per_epoch(phase: Phase) -> int:
    """Views of an epoch, if no image is quarantined, as far as known.

    Raises:
        UserError: if they do not fill one batch.
    """
    train = phase.plan.split("train")
    assert train is not None
    images, batch = phase.views, phase.settled.train.batch_size
    if images < batch and train.is_counted:
        raise UserError(
            f"train.batch_size={batch} is more than the {images} views of {train.dataset.location}; lower it"
        )
    return images


def training_plan(phase: Phase) -> dict[str, str]:
    """Readable rows on student, training and grids; raises a UserError if training would be refused."""
    config, teachers = phase.settled, phase.plan.teachers
    check_losses(config.loss)
    check_mask_teachers(teachers)
    share = config.train.batch_size // max(1, config.train.most_workers)
    _check_share(config, share)
    check_images(phase)
    if config.views.mixup and config.train.decoder != "cpu":
        raise UserError(f"train.decoder: {NO_MIXUP}")
    if config.loss.standardise == "phi_s":
        _warn_of_projections(teachers)
    student = build_student(config)
    grid, labels = feature_map_size(student, config.student.input_size), teacher_labels(teachers)
    strides = ", ".join(map(str, student.tap_strides))
    rows = {
        "student": f"{config.student.name} at {config.student.input_size} px, feature maps of strides {strides}",
        **({"start": f"weights of {config.student.weights}"} if phase.start else {}),
        "training": _training(phase),
        "learning rate": config.train.lr_rule,
        "kNN": f"{config.knn.k} neighbours{_if_labelled(phase.plan)}"
        if _labelled(phase.plan)
        else f"none: {_lacking(phase.plan)}",
    }
    settings, masked = config.loss.masks, [labels[t.id] for t in teachers if makes_masks(t.config)]
    if masked:
        rows["masks"] = (
            f"of {', '.join(masked)}: {settings.prompts} prompts per image, {settings.iterations} times each"
        )
    rows |= {f"grid {labels[t.id]}": str(GridRule(grid, t.spec.grid)) for t in teachers}
    for resolution, plan in zip(config.resolutions, phase.further, strict=True):
        side, own = resolution.input_size, (plan or phase.plan).teachers
        check_mask_teachers(own)
        grid = feature_map_size(student, side)
        rules = (
            f"{label} {GridRule(grid, found.spec.grid)}" for label, found in zip(labels.values(), own, strict=True)
        )
        rows[f"at {side} px"] = f"{resolution.share:.0%} of the samples of a step; {'; '.join(rules)}"
    return rows


def _training(phase: Phase) -> str:
    """Epochs and steps, as far as known."""
    train, settings, views = phase.plan.split("train"), phase.settled.train, views_per_epoch(phase)
    assert train is not None
    steps = views // settings.batch_size
    if train.is_counted:
        return settings.describe_epochs(views, steps)
    known = f"about {steps}" if train.is_estimated else "an unknown number of"
    return f"{settings.epochs} epochs of {known} steps of {settings.batch_size} images"


def check_images(phase: Phase) -> None:
    """Raise a UserError if training needs more images, or labels."""
    views_per_epoch(phase)
    check_best_metric(phase.config.train.best_metric, _evaluated(phase.plan))


def _warn_of_projections(teachers: Sequence[CachedTeacher]) -> None:
    labels = teacher_labels(teachers)
    if chosen := [labels[teacher.id] for teacher in teachers if Codec.parse(teacher.codec).pca]:
        log.warning(
            "loss.standardise=phi_s: what the cache keeps of %s was chosen for mean_std; with a few channels of large deviation "
            "it keeps less of these targets than the plan says: set cache.codec=int8 or float16",
            ", ".join(chosen),
        )


def check_session(phase: Phase) -> None:
    """Raise a UserError if the GPUs of this Ray session do not divide the batch, or each would get too few images."""
    config = phase.settled
    _check_share(config, config.train.batch_size // count_shares(config.train))


def _check_share(config: DistillJobConfig, share: int) -> None:
    """Raise a UserError if a worker's part of a batch cannot be divided into input sizes, or these into images of all crops."""
    sizes = divide_batch(share, [resolution.share for resolution in config.resolutions])
    if min(sizes) < 1:
        raise UserError(
            f"resolutions: {share} images a worker are too few to divide into {sizes}; raise train.batch_size"
        )
    for size in sizes:
        check_per_step(config.views.per_step, config.views.crops or 1, size)


def _evaluated(plan: CachePlan) -> list[str]:
    """Names of the metrics that `DistillTask` will evaluate."""
    if plan.split("val") is None:
        return []
    labels = teacher_labels(plan.teachers)
    parts = [f"{labels[teacher.id]}/{kind}" for teacher in plan.teachers for kind in teacher.shapes]
    names = [f"val_{measure}/{part}" for measure in ("cosine", "loss") for part in parts]
    names += [f"val_mask_iou/{labels[teacher.id]}" for teacher in plan.teachers if makes_masks(teacher.config)]
    return ["knn", "knn_raw", *names] if _labelled(plan) else names


def _labelled(plan: CachePlan) -> bool:
    labelled = [split.labelled for split in plan.splits]
    return len(labelled) > 1 and all(labelled)


def _if_labelled(plan: CachePlan) -> str:
    return ", if the files hold labels" if any(split.unopened for split in plan.splits) else ""


def _lacking(plan: CachePlan) -> str:
    return "the images have no labels" if plan.split("val") else "data.val names no held-out images"


def make_job(config: DistillJobConfig, plan: CachePlan, further: Sequence[CachePlan | None] = ()) -> DistillJob:
    """The job on complete caches, with the rotations of PHI-S if the loss standardises by them.

    If held-out images have no labels, it logs a warning and measures no kNN.

    Args:
        further: as in :class:`~pipeline.distill.phases.Phase`.
    """
    train, val = plan.split("train"), plan.split("val")
    assert train is not None
    held_out = val.dataset if val else None
    if config.loss.standardise == "phi_s":
        for teacher in plan.teachers:
            freeze_phi_s(train.dataset, teacher)
    labelled = held_out if held_out and train.dataset.labelled and held_out.labelled else None
    if held_out and not labelled:
        log.warning("no kNN: data.train or data.val has no labels")
    resolutions = []
    for resolution, own in zip(config.resolutions, further, strict=True):
        images = own.split("train") if own else train
        assert images is not None
        teachers = (own or plan).teachers
        resolutions.append(Resolution(resolution.input_size, resolution.share, images.dataset, teachers))
    return DistillJob(config, train.dataset, labelled, plan.teachers, held_out, tuple(resolutions))
