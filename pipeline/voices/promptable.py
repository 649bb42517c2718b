"""Masks from ground-truth boxes: those of a student's SAM head beside those of SAM itself, by IoU and COCO's mask AP."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.downstream.base import evenly
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.detect.coco import CocoImages, SceneObjects
from pipeline.downstream.detect.coco_eval import average_precision, coco_index
from pipeline.downstream.detect.task import coco_results
from pipeline.downstream.images import split_location
from pipeline.errors import UserError
from pipeline.runs.addresses import fetch_student
from pipeline.runs.folder import work_folder
from pipeline.runtime.progress import Progress
from pipeline.sources.locations import SAMPLES, absolute
from pipeline.student.loading import load_student
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.run import Run
from pipeline.voices.config import PromptsConfig, PromptsJobConfig
from pipeline.voices.prompts import Prompts, make_prompts, variant_of
from pipeline.voices.sam_head import sam_embeddings
from teachers.base import Teacher
from teachers.registry import create_teacher
from teachers.sam_masks import SamMasks

Examples = CocoImages | SceneObjects


@dataclass(frozen=True)
class PromptsPlan:
    """The plan of a measurement.

    Attributes:
        student, teacher: give masks; both have the same decoder.
        label: of the teacher.
        rows: of the images that are measured.
        student_run: the MLflow run that trained the student, if known.
    """

    student: Prompts
    teacher: Prompts
    label: str
    examples: Examples
    rows: Sequence[int]
    student_run: str | None = None


def plan_promptable(config: PromptsJobConfig) -> PromptsPlan:
    """Open student, teacher and images, before anything expensive starts.

    Raises:
        UserError, TeacherError: if the student has no SAM head, SAM's weights cannot be had, or the annotations are wrong.
    """
    settings = config.evaluate
    if not settings.student:
        raise UserError("evaluate.student must be given: the exported folder of a student, or its MLflow URI")
    examples = open_examples(config)
    work = work_folder(config)
    loaded = load_student(fetch_student(settings.student, resolve_uri(config.tracking.uri, work), work))
    student = make_prompts(loaded, config.prompts.sam, settings.input_size)
    label = sam_embeddings(loaded).label
    teacher = sam_itself(open_sam(config.prompts, label), student.masks, student.device)
    rows = evenly(len(examples), min(config.prompts.limit or len(examples), len(examples)))
    return PromptsPlan(student, teacher, label, examples, [*rows], loaded.provenance.get("run_id"))


def open_examples(config: PromptsJobConfig) -> Examples:
    """Held-out images with instance masks; UserError if there are none."""
    location = split_location(cast(FinetuneJobConfig, config), "val")
    annotations = config.prompts.annotations
    if location is None:
        raise UserError("data.val: an evaluation needs held-out images")
    if location == SAMPLES:
        return SceneObjects(cast(FinetuneJobConfig, config), "val")
    if annotations is None:
        raise UserError("prompts.annotations must be given for data.val: instance masks in COCO's format")
    try:
        return CocoImages(absolute(location), annotations, masks=True, training=False)
    except UserError as error:
        raise UserError(str(error).replace("; detect.masks=false trains only boxes", "")) from error


def open_sam(settings: PromptsConfig, label: str) -> Teacher:
    """SAM's image encoder at its own grid."""
    return create_teacher(
        f"sam/{variant_of(label)}",
        weights=settings.sam,
        input_size=settings.sam_size,
        pool=1,
        args=settings.sam_args,
    )


def sam_itself(teacher: Teacher, masks: SamMasks, device: torch.device) -> Prompts:
    """SAM with its own embeddings in the student's place; loads its image encoder."""
    teacher.load(device)
    spec = teacher.spec
    embed = lambda pixels: teacher.encode(pixels).patches.permute(0, 3, 1, 2)  # noqa: E731
    return Prompts(embed, masks, spec.name, spec.input_size[0], device, spec.interpolation)


def measure(plan: PromptsPlan) -> dict[str, float]:
    """Mean IoU over objects and COCO's mask AP, in percent, of the student and (`teacher_`) of SAM; their ratio of IoU.

    A box is the prompt of one object; its mask is scored by the predicted IoU. Crowds, and boxes of less than a pixel, are not
    prompted for.
    """
    ious: dict[str, list[Tensor]] = {"": [], "teacher_": []}
    results: dict[str, list[dict[str, Any]]] = {"": [], "teacher_": []}
    prompts = {"": plan.student, "teacher_": plan.teacher}
    with Progress(len(plan.rows), "img", "prompting") as progress:
        for row in plan.rows:
            pixels, objects = plan.examples.read(row)
            image = pixels.permute(1, 2, 0).numpy()
            for prefix, model in prompts.items() if len(objects.boxes) else ():
                found = model.embed(image).boxes(objects.boxes.tolist())
                assert found.masks is not None
                ious[prefix].append(mask_iou(found.masks, objects.masks.bool()))
                named = coco_results(found, plan.examples.image_id(row), [0])
                for entry, label in zip(named, objects.labels.tolist(), strict=True):
                    entry["category_id"] = plan.examples.category_ids[label - 1]
                results[prefix] += named
            progress.update()
    if not ious[""]:
        raise UserError(f"{plan.examples.location}: no object to prompt for in the images that are measured")
    truth = coco_index(_of_rows(plan))
    figures: dict[str, float] = {}
    for prefix in prompts:
        figures[f"{prefix}mask_iou"] = 100 * torch.cat(ious[prefix]).mean().item()
        figures[f"{prefix}mask_ap"] = 100 * average_precision(truth, results[prefix], "segm").numbers["AP"]
    figures["prompts_ratio"] = 100 * figures["mask_iou"] / max(figures["teacher_mask_iou"], 1e-9)
    return {**figures, "images": float(len(plan.rows)), "objects": float(len(torch.cat(ious[""])))}


def log_images(plan: PromptsPlan, run: Run) -> None:
    """Log the images that are measured, by a digest of their names."""
    keys = "\n".join(plan.examples.key(row) for row in plan.rows)
    identity = hashlib.sha256(keys.encode()).hexdigest()
    run.log_dataset(f"val-{len(plan.rows)}", plan.examples.location, identity, "val")


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """IoU [n] float32 of masks bool [n, H, W] with their truth; 1 where both are empty."""
    both, either = ((part.sum(dim=(1, 2))).float() for part in (found & truth, found | truth))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _of_rows(plan: PromptsPlan) -> Mapping[str, Any]:
    """The ground truth of the images that are measured."""
    truth = plan.examples.truth()
    kept = {plan.examples.image_id(row) for row in plan.rows}
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in kept],
        "annotations": [entry for entry in truth["annotations"] if entry["image_id"] in kept],
    }
