"""Fine-tuned models on disk and in MLflow. Imports no Ray, and MLflow only for models in MLflow.

model.safetensors, model.json    weights; task, backbone, classes and settings from which the network is built
provenance.json                  its origin, for model cards
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.downstream.backbone import find_encoder
from pipeline.downstream.base import DownstreamTask, make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.training import FinetuneJob
from pipeline.errors import UserError, one_line
from pipeline.runs.addresses import fetch_model
from pipeline.student.model import Encoder, build_encoder, load_weights, save_described


@dataclass(frozen=True)
class SavedModel:
    """A fine-tuned model in evaluation mode.

    Attributes:
        task: under the configuration of its training; fields that the task does not save have their defaults.
        classes: names by number.
        backbone: ``model`` and ``args`` from which timm builds the backbone.
        provenance: its known origin, JSON-ready.
    """

    task: DownstreamTask[Any]
    model: nn.Module
    classes: tuple[str, ...]
    backbone: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> Encoder:
        """The backbone under the head."""
        return find_encoder(self.model)

    @property
    def student_run(self) -> str | None:
        """MLflow run that trained the student, if known."""
        return self.provenance.get("student", {}).get("run_id")

    def save(self, folder: Path) -> None:
        """Write what :func:`load_model` reads."""
        description = {
            "task": self.task.config.finetune.task,
            "backbone": dict(self.backbone),
            "classes": list(self.classes),
            "settings": dict(self.task.saved_settings()),
        }
        save_described(self.model.state_dict(), description, folder, "model")
        if self.provenance:
            (folder / "provenance.json").write_text(json.dumps(self.provenance, indent=2), encoding="utf-8")


def finished_model(
    model: nn.Module, job: FinetuneJob, classes: Sequence[str], provenance: Mapping[str, Any] | None = None
) -> SavedModel:
    """The model that a fine-tuning job trained."""
    start = json.loads((job.start / "student.json").read_text(encoding="utf-8"))
    backbone = {"model": start["model"], "args": start["args"]}
    return SavedModel(job.task, model.eval(), tuple(classes), backbone, provenance or {})


def load_model(folder: Path) -> SavedModel:
    """Read what :meth:`SavedModel.save` wrote.

    Raises:
        UserError: if the folder holds no fine-tuned model.
    """
    try:
        described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        root = FinetuneJobConfig.of_task(described["task"])
        task = make_task(root.model_validate({**described["settings"], "finetune": {"task": described["task"]}}))
        classes = tuple(described["classes"])
        model = task.build(build_encoder(described["backbone"]), classes)
        load_weights(model, folder / "model.safetensors")
        origin = folder / "provenance.json"
        known = json.loads(origin.read_text(encoding="utf-8")) if origin.is_file() else {}
    except Exception as error:  # as in `load_encoder`
        raise UserError(f"{folder} is not a fine-tuned model: {one_line(error)}") from error
    return SavedModel(task, model.eval(), classes, described["backbone"], known)


def find_model(name: str, tracking_uri: str) -> SavedModel | None:
    """The fine-tuned model that a folder or an MLflow URI names; None if it names something else.

    Raises:
        UserError: if the URI cannot be resolved, or the model is damaged.
    """
    folder = fetch_model(name, tracking_uri)
    return load_model(folder) if (folder / "model.json").is_file() else None
