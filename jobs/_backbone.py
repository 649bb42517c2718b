"""The arguments that name a backbone, for jobs that take no recipe.

What takes seconds to import is imported in functions, so that the command line is read first.
"""

import argparse

from pipeline.runs.config import JobConfig


def add_model_arguments(parser: argparse.ArgumentParser, accepted: str) -> None:
    """Add the arguments that name a backbone; `accepted` says which kinds of model the job takes."""
    parser.add_argument("model", help=accepted)
    parser.add_argument(
        "--weights", default="pretrained", help="weights of a timm name: pretrained, random[:seed], or a file"
    )
    parser.add_argument("--size", type=int, help="side of the input in pixels; default: as the student was trained")
    parser.add_argument("--tracking-uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else the work folder's")


def tracking_uri(options: argparse.Namespace) -> str:
    """The MLflow store in which URIs are looked up."""
    from pipeline.runs.folder import work_folder
    from pipeline.tracking.address import resolve_uri

    return resolve_uri(options.tracking_uri, work_folder(JobConfig()), "--tracking-uri")
