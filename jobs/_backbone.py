"""The arguments that name a backbone, for jobs that take no recipe.

What takes seconds to import is imported in functions, so that the command line is read first.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.runs.config import JobConfig

if TYPE_CHECKING:
    from pipeline.student.loading import LoadedStudent


def naming(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the arguments that name a backbone, for :func:`load_named`; `what` describes what the job takes."""
    parser.add_argument("model", help=what)
    parser.add_argument(
        "--weights", default="pretrained", help="weights of a timm name: pretrained, random[:seed], or a file"
    )
    parser.add_argument("--size", type=int, help="side of the input in pixels; default: as the student was trained")
    parser.add_argument("--tracking-uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else the work folder's")


def load_named(options: argparse.Namespace) -> tuple[LoadedStudent, int]:
    """The backbone that the arguments of :func:`naming` name, and the side of its input in pixels."""
    from pipeline.runs.addresses import fetch_student
    from pipeline.student.loading import load_student

    loaded = load_student(fetch_student(options.model, tracking_uri(options)), weights=options.weights)
    return loaded, options.size or loaded.input_size or 224


def tracking_uri(options: argparse.Namespace) -> str:
    """The MLflow store in which URIs are looked up."""
    from pipeline.runs.folder import work_folder
    from pipeline.tracking.address import resolve_uri

    return resolve_uri(options.tracking_uri, work_folder(JobConfig()), "--tracking-uri")
