"""The README of an exported folder: how to load it, its difference from eager, and its provenance."""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.distill.provenance import all_licences, all_teachers
from pipeline.export.formats import GRAPHS
from pipeline.export.graphs import OUTPUT
from pipeline.export.hub import MAPS

_SPDX = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "bsd-3-clause")


VOICES = {
    ("clip/", ".summary"): 'words: `jobs/predict.py <folder> photos --classes "a cat, a dog"`, or `--find "a red car"`',
    ("dinov", ".patches"): "correspondences: `jobs/predict.py <folder> photos --pca`, `--parts 6`, or two images and `--match`",
    ("sam/", ".patches"): "prompts: `jobs/predict.py <folder> photo.jpg --boxes 40,30,200,180`, `--points` or `--everything`",
}  # fmt: skip
"""What a student can do with the heads of its teachers, by the first and last characters of an output's name."""

COUNTS = ("images", "objects", "captions", "lr")
"""Figures of evaluations that are no percentages."""


def voices(described: dict[str, Any]) -> list[str]:
    """What an exported student can do with its heads, in words."""
    names = [output["name"] for output in described["outputs"]]
    return [
        text for (first, last), text in VOICES.items() if any(n.startswith(first) and n.endswith(last) for n in names)
    ]


def shown(name: str, value: float) -> str:
    """A figure of an evaluation in words."""
    return f"{name} {value:g}" if name in COUNTS else f"{name} {value:.1f} %"


def model_card(described: dict[str, Any]) -> str:
    """The model card of an exported folder, from its export.json."""
    return _render(described, front=None)


def hub_card(described: dict[str, Any]) -> str:
    """The model card of the folder for the hub: front matter, then what timm's users need."""
    task = "image-classification" if described["classes"] else "image-feature-extraction"
    front: dict[str, Any] = {"library_name": "timm", "pipeline_tag": task, "tags": ["timm", task, "distillation"]}
    licences = {licence.lower() for licence in all_licences(described["provenance"])}
    # What a student may be used for is for its maker to say; the teachers' licences are the known part.
    if len(licences) == 1 and licences <= set(_SPDX):
        front["license"] = licences.pop()
    else:
        front |= {"license": "other", "license_name": "see-teachers"}
    return _render(described, front=yaml.safe_dump(front, sort_keys=False).strip())


def _render(described: dict[str, Any], front: str | None) -> str:
    fine_tuned = described["outputs"][0]["name"] != OUTPUT
    kind = "A fine-tuned model" if fine_tuned else "An image encoder"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja").render(
        described,
        front=front,
        kind="An image classifier" if described["classes"] else kind,
        maps=MAPS,
        graphs=GRAPHS,
        all_teachers=all_teachers,
        voices=voices(described),
        evaluations=[
            {**entry, "figures": [shown(*figure) for figure in entry["figures"].items()]}
            for entry in described["provenance"].get("evaluations", [])
        ],
    )
