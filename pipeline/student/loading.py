"""Backbones by name: exported students and timm models."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from pipeline.errors import UserError, did_you_mean, one_line
from pipeline.student.model import Encoder, build_encoder, create_backbone, load_encoder
from pipeline.student.nearest import nearest_folders
from teachers.base import TeacherError
from teachers.checkpoint import read_checkpoint
from teachers.fit import check_keys
from teachers.hub import HubFile, load_from_hub
from teachers.weights import parse_weights


class LoadedStudent(NamedTuple):
    """A backbone with its weights, in evaluation mode, on the CPU.

    Attributes:
        name: of the model.
        input_size: side in pixels at which it was trained, if known.
        args: for `timm.create_model`, besides the name.
        provenance: JSON-ready: teachers, data, training and metrics, or the weights' origin.
        folder: of an exported student.
    """

    encoder: Encoder
    name: str
    input_size: int | None
    args: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path | None = None


def load_student(student: str, *, weights: str = "pretrained", args: Mapping[str, Any] | None = None) -> LoadedStudent:
    """Load a student; :func:`pipeline.runs.addresses.fetch_student` fetches one from MLflow or an object store first.

    Args:
        student: an exported folder, or a name in timm (`regla_m`, `timm/<name>`).
        weights: of a timm model: `pretrained`, `random[:seed]`, or the path of a file with the same keys.
        args: for `timm.create_model`; for an exported student, in addition to its own.

    Raises:
        UserError: if it is none of these, or its weights cannot be loaded or do not fit `args`.
    """
    if (folder := Path(student).expanduser()).is_dir():
        return _from_folder(folder, args or {})
    if student.startswith("timm/") or timm.is_model(student):
        encoder, size = _from_timm(student, weights, args or {})
        return LoadedStudent(encoder, student.removeprefix("timm/"), size, args or {}, {"weights": weights})
    raise UserError(
        f"{student}: neither an exported student folder, nor an MLflow URI (models:/m-...), nor a name that timm knows"
        + (nearest_folders(student) or did_you_mean(student, timm.list_models(), most=3))
    )


def load_initial_student(
    name: str, weights: str, args: Mapping[str, Any], fetch: Callable[[str], str] = str
) -> LoadedStudent:
    """The backbone of `student.name` and `student.args`, with the weights that `student.weights` names.

    Args:
        weights: `pretrained`, a checkpoint file, or an exported student: its folder, its address, or its URI in MLflow.
        fetch: returns the local path of such an address or URI, and other names unchanged.

    Raises:
        UserError: if they cannot be loaded, or belong to another network.
    """
    create_backbone(name, args)  # refuses name and arguments before anything is fetched
    if weights.partition(":")[0] == "random":
        raise UserError(f"student.weights={weights}: random weights are drawn from `seed`; set student.weights=random")
    try:
        loaded = _find_initial(name, fetch(weights), args)
    except UserError as error:
        raise UserError(f"student.weights={weights}: {error}") from error
    if loaded.name.removeprefix("timm/") != name.removeprefix("timm/"):
        raise UserError(f"student.weights: {weights} belongs to {loaded.name}; set student.name={loaded.name}")
    built, asked = ({"num_classes": 0, **some} for some in (loaded.args, args))
    if built != asked:
        needed = {key: value for key, value in loaded.args.items() if (key, value) != ("num_classes", 0)}
        raise UserError(
            f"student.weights: {weights} was built with other arguments; set student.args={json.dumps(needed)}"
        )
    return loaded


def _find_initial(name: str, weights: str, args: Mapping[str, Any]) -> LoadedStudent:
    if (folder := Path(weights).expanduser()).is_dir():
        return _from_folder(folder, args)
    encoder, size = _from_timm(name, weights, args)
    known: Mapping[str, Any] = encoder.backbone.pretrained_cfg  # type: ignore[assignment]
    published = weights == "pretrained"
    identity = parse_weights(weights, name, f"{known.get('architecture')}.{known.get('tag')}").identity
    origin = {"weights": identity, "licence": (known.get("license") if published else None) or "unknown"}
    return LoadedStudent(encoder, name, size, args, origin)


def _from_folder(folder: Path, args: Mapping[str, Any]) -> LoadedStudent:
    encoder = load_encoder(folder)
    described = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    if args:
        described["args"] |= args
        weights = encoder.state_dict()
        try:
            encoder = build_encoder(described).eval()
            encoder.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            refused = f"{described['args']}: {one_line(error)}"
            raise UserError(f"student.args: the weights of {folder} do not fit {refused}") from error
    origin = folder / "provenance.json"
    known = json.loads(origin.read_text(encoding="utf-8")) if origin.is_file() else {}
    return LoadedStudent(encoder, described["model"], described.get("input_size"), described["args"], known, folder)


def _from_timm(name: str, weights: str, args: Mapping[str, Any]) -> tuple[Encoder, int | None]:
    """The network, and the side in pixels at which its weights were trained."""
    try:
        source = parse_weights(weights, name, "pretrained")
        if source.kind == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(source.value))
                return Encoder(create_backbone(name, args)).eval(), None
        backbone = create_backbone(name, args)
        known: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
        if source.kind == "hub":
            backbone = load_from_hub(name, lambda: _pretrained(name, args), HubFile.of_timm(known))
        else:
            heads = known.get("classifier") or ()
            ignored = [f"{head}." for head in ([heads] if isinstance(heads, str) else heads)]
            state = check_keys(read_checkpoint(source.value, name), backbone.state_dict(), name, ignored)
            backbone.load_state_dict(state)
    except TeacherError as error:
        raise UserError(str(error).removeprefix("teacher ")) from error
    return Encoder(backbone).eval(), known["input_size"][-1]


def _pretrained(name: str, args: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(name.removeprefix("timm/"), pretrained=True, **{"num_classes": 0, **args})
    return model
