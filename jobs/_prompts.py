"""The flags of the prompts that a student with a SAM head answers, and what the jobs do with them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import asked_flag, name_left_out, percent, table, tracking_uri

if TYPE_CHECKING:
    from pipeline.voices.config import PromptsJobConfig

FOLDER = Path("predictions")


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of `12,34` or `12,34,1`."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not numbers with commas between them") from None


def point(text: str) -> tuple[float, ...]:
    """A value of `--points`: x,y or x,y,label."""
    given = numbers(text)
    if len(given) not in (2, 3) or (len(given) == 3 and given[2] not in (0, 1)):
        raise argparse.ArgumentTypeError(f"{text} is not x,y, or x,y,1 (on the object) or x,y,0 (not on it)")
    return given


def box(text: str) -> tuple[float, ...]:
    """A value of `--boxes`: left,top,right,bottom."""
    given = numbers(text)
    if len(given) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not left,top,right,bottom")
    return given


def add_sam_flag(parser: argparse._ActionsContainer) -> None:
    """The flag that names SAM's weights."""
    parser.add_argument(
        "--sam",
        help="weights of the SAM that taught the student: pretrained (the default), random[:seed], or a checkpoint file with "
        "prompt encoder and mask decoder",
    )


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    group = parser.add_argument_group(
        "prompts", "for a student distilled with a SAM teacher and student.keep_heads=true"
    )
    group.add_argument(
        "--points",
        nargs="+",
        type=point,
        metavar="X,Y[,LABEL]",
        help="cut out the one object that these points name, in pixels of each image; label 0: not on the object",
    )
    group.add_argument(
        "--boxes",
        nargs="+",
        type=box,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="cut out the object in each of these boxes, in pixels of each image",
    )
    group.add_argument("--everything", action="store_true", help="cut out all objects")
    add_sam_flag(group)


def asks_for_masks(options: argparse.Namespace) -> bool:
    """Whether `predict` is given prompts; UserError for flags that do not go together."""
    from pipeline.errors import UserError

    asked = asked_flag(options, ("points", "boxes", "everything"))
    if options.sam and not asked:
        raise UserError("--sam: needs --points, --boxes or --everything")
    return asked is not None


def predict_masks(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write the masks that the prompts ask for in every readable image, and name the others."""
    from pipeline.errors import UserError
    from pipeline.predict.files import earlier_predictions, write_predictions
    from pipeline.predict.images import find_images
    from pipeline.voices.prompt_files import Prompted, PromptFiles
    from pipeline.voices.prompts import load_prompts

    folder = options.to or FOLDER
    if folder.suffix:
        raise UserError(f"--to: {folder}: masks are written into a folder; name one without an ending")
    paths, left_out = find_images(options.images)
    prompts = load_prompts(
        options.model,
        sam=options.sam or "pretrained",
        input_size=options.size,
        device=options.device,
        tracking_uri=tracking_uri(options),
    )
    prompts.unreadable = {}
    predictor = Prompted(prompts, options.points or (), options.boxes or ())
    files = PromptFiles(predictor)
    if earlier := earlier_predictions(files, paths, folder):
        print(f"replacing the {len(earlier)} files of an earlier prediction in {folder}", flush=True)
    written = write_predictions(predictor, files, paths, folder, earlier)
    count = len(list(predictor.readable(paths)))
    print(table({"images": count, "objects": predictor.count, "masks": ", ".join(map(str, written))}))
    figures: dict[str, Any] = {"task": "prompts", "images": count, "objects": predictor.count}
    figures |= {"files": [str(file.resolve()) for file in written]}
    return figures | name_left_out(left_out, prompts.unreadable)


def write_prompts(options: argparse.Namespace) -> dict[str, Any]:
    """Write the two ONNX files of `export --sam`, and print them."""
    from pipeline.runs.addresses import fetch_student
    from pipeline.student.loading import load_student
    from pipeline.voices.prompt_export import DECODER, ENCODER, export_prompts

    loaded = load_student(fetch_student(options.model, tracking_uri(options)), weights=options.weights)
    described = export_prompts(loaded, options.sam, options.to, options.size)
    errors = {name: described[name]["relative_error"] for name in (ENCODER, DECODER)}
    rows = {
        name: f"{options.to / name}  differs from eager by {error:.1e} of the largest output"
        for name, error in errors.items()
    }
    print(table(rows), flush=True)
    return {"prompts": described}


def promptable(config: PromptsJobConfig, dry_run: bool) -> dict[str, Any]:
    """Mask IoU and AP of the student's SAM head from ground-truth boxes on data.val, beside SAM itself."""
    from pipeline.runs.session import open_job
    from pipeline.voices.promptable import log_images, measure, plan_promptable

    plan = plan_promptable(config)
    print(
        f"promptable of {config.evaluate.student} at {plan.student.input_size} px, beside {plan.label} at "
        f"{plan.teacher.input_size} px: boxes of {len(plan.rows)} images from {plan.examples.location} as prompts",
        flush=True,
    )
    for note in plan.examples.check():
        print(f"  note: {note}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, "promptable") as job:
        job.run.set_tags({"student": str(config.evaluate.student), "teacher": plan.label})
        job.run.set_student_run(plan.student_run)
        log_images(plan, job.run)
        figures = measure(plan)
        job.run.log_metric_dict(figures)
    counts = ("images", "objects")
    shown = {name: f"{value:g}" if name in counts else percent(value) for name, value in figures.items()}
    print(f"done\n{table({**shown, 'MLflow': f'{job.tracking_uri} run {job.run.run_id}'})}")
    return {**figures, "mlflow_run_id": job.run.run_id}
