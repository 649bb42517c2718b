"""The flags of correspondences between images, and what `predict` does with them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import asked_flag, name_left_out, percent, table, tracking_uri

if TYPE_CHECKING:
    from pipeline.voices.config import CorrespondenceJobConfig

FLAGS = ("pca", "match", "parts")
FOLDER = Path("correspondences")


def point(text: str) -> tuple[float, float]:
    """Read `x,y` in pixels."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text)):
        raise argparse.ArgumentTypeError(f"{text} is not x,y in pixels")
    return float(found[1]), float(found[2])


def add_correspondence_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    group = parser.add_argument_group(
        "correspondences",
        "for a student distilled with a DINOv2 teacher and student.keep_heads=true; --teacher names another teacher's head, "
        "or `backbone`",
    )
    group.add_argument("--pca", action="store_true", help="patches in colours: equal colours are alike in all images")
    group.add_argument("--match", action="store_true", help="the matching patches of two images")
    group.add_argument(
        "--keypoints", nargs="+", type=point, metavar="X,Y", help="points of the first image to find in the second"
    )
    group.add_argument("--parts", type=int, metavar="K", help="divide all images into K parts that are alike")


def asks_for_correspondences(options: argparse.Namespace) -> bool:
    """Whether `predict` is asked for correspondences."""
    from pipeline.errors import UserError

    if options.keypoints and not options.match:
        raise UserError("--keypoints: needs --match, whose first image has them")
    return asked_flag(options, FLAGS) is not None


def predict_correspondences(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write pictures and JSON files into a folder."""
    from pipeline.errors import UserError
    from pipeline.predict.images import find_images
    from pipeline.voices.correspondence_files import new_folder, write_colours, write_match, write_parts
    from pipeline.voices.heads import open_student
    from pipeline.voices.patches import load_patches

    if options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size}: at least 1")
    folder = options.to or FOLDER
    paths, left_out = find_images(options.images)
    predictor, whose = load_patches(
        open_student(options.model, tracking_uri(options), options.weights),
        options.teacher,
        input_size=options.size,
        device=options.device,
        batch_size=options.batch_size,
    )
    new_folder(folder)
    figures: dict[str, Any] = {"folder": str(folder.resolve()), "features": whose}
    if options.match:
        figures |= {"matches": write_match(predictor, paths, folder, options.keypoints or ())}
    else:
        predictor.unreadable = {}
        pca = options.pca
        count = write_colours(predictor, paths, folder) if pca else write_parts(predictor, paths, options.parts, folder)
        figures |= {"images": count}
    print(table(figures))
    return figures | name_left_out(left_out, predictor.unreadable)


def correspondence(config: CorrespondenceJobConfig, dry_run: bool) -> dict[str, Any]:
    """Percentage of correct key points of a student, measured in this process."""
    from pipeline.errors import UserError
    from pipeline.runs.folder import work_folder
    from pipeline.runs.session import open_job
    from pipeline.tracking.address import resolve_uri
    from pipeline.voices.correspondence import key_point_accuracy
    from pipeline.voices.heads import open_student
    from pipeline.voices.pairs import open_pairs
    from pipeline.voices.patches import load_patches

    given = config.correspondence
    if not given.student:
        raise UserError(
            "correspondence.student must be given: an exported student folder, its MLflow URI, or a timm name"
        )
    student = open_student(given.student, resolve_uri(config.tracking.uri, work_folder(config)), given.weights)
    predictor, whose = load_patches(student, given.teacher, input_size=given.input_size)
    found = open_pairs(given.pairs, given.split, given.samples, given.sample_size, config.seed)
    side = predictor.input_size
    print(
        f"correspondence of {given.student} ({whose}) at {side} px: {found.count} pairs of {found.location}", flush=True
    )
    if dry_run:
        return {"dry_run": True}
    with open_job(config, "correspondence") as job:
        job.run.set_tags({"student": given.student, "features": whose})
        job.run.set_student_run(student.provenance.get("run_id"))
        job.run.log_dataset(found.name, found.location, found.fingerprint, "val")
        figures = key_point_accuracy(predictor, found.pairs)
        job.run.log_metric_dict(figures)
    shown = {key: percent(value) for key, value in figures.items()}
    print(f"done\n{table({**shown, 'MLflow': f'{job.tracking_uri} run {job.run.run_id}'})}")
    return {**figures, "mlflow_run_id": job.run.run_id}
