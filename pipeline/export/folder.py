"""A model as a folder for other programs: chosen formats, each compared with eager; a description; a model card.

    student.safetensors, student.json   weights as trained, for this project (model.* for a classifier)
    student.pt2                         torch.export; student.onnx: ONNX; student.mlpackage: Core ML
    hf                                  the layout of the Hugging Face hub, for timm
    export.json                         input, output, preprocessing, classes, parity with eager, latency, provenance
    README.md                           the same for people

The graphs hold the normalisation and are in their inference form (branches merged, BatchNorm folded).
"""

import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from pipeline.distill import kept_heads
from pipeline.downstream.saved import load_model
from pipeline.errors import UserError
from pipeline.export.bundle import ExportBundle, make_bundle, preprocessing
from pipeline.export.card import hub_card, model_card
from pipeline.export.formats import GRAPHS, ROUNDS, Format
from pipeline.export.graphs import INPUT, export_coreml, export_onnx, export_torch
from pipeline.export.hub import is_ours, load_hub, write_hub
from pipeline.runtime.timing import interleave
from pipeline.student.loading import load_student
from pipeline.student.model import save_encoder

TOLERANCE = 1e-4
"""Largest difference from eager that is allowed, relative to the largest output."""

STEADY, ATTEMPTS = 0.2, 3
"""Largest distance of the quartiles, relative to the median, of a time that is published, and measurements at most."""

log = logging.getLogger(__name__)

Outputs = Tensor | Sequence[Tensor]
Run = Callable[[Tensor], Outputs]


class Written(NamedTuple):
    """A file or folder of one format, a function that runs it if this machine can, and the `call` of the hf format."""

    path: Path
    run: Run | None
    call: str | None = None


def export_bundle(
    bundle: ExportBundle, formats: Sequence[Format], folder: Path, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Write a model in these formats into a folder, and time it in `rounds`; returns the content of export.json.

    Raises:
        UserError: if it cannot be exported, or a file's output differs from eager.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, backbone = bundle.size, bundle.encoder.backbone
    # Height and width are dynamic from 33 pixels on (see export_torch), if the network takes other sizes at all.
    fixed = size < 33 or bool(backbone.pretrained_cfg.get("fixed_input_size", False))  # type: ignore[union-attr, operator]
    fixed = fixed or bundle.heads is not None  # the neck resizes maps to one grid
    dynamic = (0,) if fixed else (0, 2, 3)
    fused = bundle.fused() if {"torch_export", "onnx", "coreml"} & set(formats) else bundle.model
    written = {form: _WRITERS[form](bundle, fused, folder, dynamic) for form in formats}
    checks = [(1, size, size), (3, size, size) if fixed else (3, size + 32, size + 64)]
    parity = {form: _parity(bundle.model, result.run, checks, form) for form, result in written.items()}
    latency = _latency(bundle, {form: result.run for form, result in written.items() if form in GRAPHS}, rounds)
    described = _describe(bundle, fixed) | {
        "formats": {
            form: {
                "file": result.path.name,
                "parity": parity[form],
                **({"latency": latency[form]} if form in latency else {}),
                **({"call": result.call} if result.call else {}),
            }
            for form, result in written.items()
        },
        "latency": latency.get("eager"),
    }
    (folder / "export.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(model_card(described), encoding="utf-8")
    if "hf" in written:
        (written["hf"].path / "README.md").write_text(hub_card(described), encoding="utf-8")
    return described


def _describe(bundle: ExportBundle, fixed: bool) -> dict[str, Any]:
    sides = [bundle.size, bundle.size] if fixed else ["height", "width"]
    shape = ["batch", 3, *sides]
    with torch.no_grad():
        outputs = _as_list(bundle.model(torch.rand(1, 3, bundle.size, bundle.size)))
    return {
        "model": bundle.name,
        "input": {"name": INPUT, "shape": shape, "dtype": "float32", "range": [0, 1], "channels": "RGB"},
        "outputs": [
            {"name": name, "shape": ["batch", *output.shape[1:]], "meaning": meaning}
            for (name, meaning), output in zip(bundle.outputs.items(), outputs, strict=True)
        ],
        "preprocessing": preprocessing(bundle),
        "classes": list(bundle.classes),
        "own_code": is_ours(bundle),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "provenance": dict(bundle.provenance),
    }


def _safetensors(bundle: ExportBundle, fused: nn.Module, folder: Path, dynamic: Sequence[int]) -> Written:
    if bundle.saved is not None:
        bundle.saved.save(folder)
        return Written(folder / "model.safetensors", load_model(folder).model)
    save_encoder(bundle.encoder, bundle.timm_name, bundle.args, bundle.size, folder)
    if bundle.provenance:
        (folder / "provenance.json").write_text(json.dumps(dict(bundle.provenance), indent=2), encoding="utf-8")
    if bundle.heads is not None:
        kept_heads.write_heads(bundle.heads, folder)
    reloaded = make_bundle(load_student(str(folder)), bundle.size, heads=bundle.heads is not None)
    return Written(folder / "student.safetensors", reloaded.model)


def _torch_export(bundle: ExportBundle, fused: nn.Module, folder: Path, dynamic: Sequence[int]) -> Written:
    path = export_torch(fused, folder / "student.pt2", _example(bundle.size, dynamic), dynamic)
    return Written(path, torch.export.load(path).module())


def _onnx(bundle: ExportBundle, fused: nn.Module, folder: Path, dynamic: Sequence[int]) -> Written:
    import onnxruntime

    example = _example(bundle.size, dynamic)
    path = export_onnx(fused, folder / "student.onnx", example, dynamic, list(bundle.outputs))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads must not spin while another format is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Written(path, lambda images: [torch.from_numpy(o) for o in session.run(None, {INPUT: images.numpy()})])


def _hf(bundle: ExportBundle, fused: nn.Module, folder: Path, dynamic: Sequence[int]) -> Written:
    if bundle.heads is not None:
        raise UserError("--heads: the hf layout has no place for them; leave one of the two out")
    shutil.rmtree(folder / "hf", ignore_errors=True)  # timm would load any weights left there
    expression = write_hub(bundle, folder / "hf")
    return Written(folder / "hf", load_hub(folder / "hf", bundle, expression), expression)


def _coreml(bundle: ExportBundle, fused: nn.Module, folder: Path, dynamic: Sequence[int]) -> Written:
    example = torch.rand(1, 3, bundle.size, bundle.size)
    return Written(export_coreml(fused, folder / "student.mlpackage", example, list(bundle.outputs)), None)


_WRITERS: dict[Format, Callable[[ExportBundle, nn.Module, Path, Sequence[int]], Written]] = {
    "safetensors": _safetensors,
    "torch_export": _torch_export,
    "onnx": _onnx,
    "hf": _hf,
    "coreml": _coreml,
}


def _as_list(outputs: Outputs) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _example(size: int, dynamic: Sequence[int]) -> Tensor:
    return torch.rand(2, 3, size, size + 32 if 3 in dynamic else size)


@torch.no_grad()
def _parity(
    eager: nn.Module, run: Run | None, shapes: Sequence[tuple[int, int, int]], form: str
) -> dict[str, Any] | str:
    """Largest difference from eager on random images of these (batch, height, width), relative to the largest output."""
    if run is None:
        return "not run: Core ML needs macOS"
    worst = 0.0
    for batch, height, width in shapes:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        for found, expected in zip(_as_list(run(images)), _as_list(eager(images)), strict=True):
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item())
    if not worst <= TOLERANCE:
        raise UserError(f"{form}: differs from eager by {worst:.1e} of the largest output, more than {TOLERANCE:g}")
    return {"relative_error": worst, "tolerance": TOLERANCE, "shapes": [[b, 3, h, w] for b, h, w in shapes]}


@torch.inference_mode()
def _latency(bundle: ExportBundle, runs: Mapping[Format, Run | None], rounds: int) -> dict[str, Any]:
    """Time of one image by format and of "eager", measured in turns; empty if other programs disturb every attempt."""
    image = torch.rand(1, 3, bundle.size, bundle.size)
    every: dict[str, Run] = {"eager": bundle.model, **{form: run for form, run in runs.items() if run}}
    if len(every) == 1:
        return {}
    calls = {name: lambda run=run: run(image) for name, run in every.items()}
    threads = torch.get_num_threads()
    for _ in range(ATTEMPTS):
        timings = interleave(calls, lambda _: "eager", rounds)
        spread = max(timing.spread for timing in timings.values())
        if spread <= STEADY:
            break
    else:
        log.warning(
            "the time of an image is left out, because it varies by %.0f %%: other programs use this machine; "
            "export again when it is quiet",
            100 * spread,
        )
        return {}
    return {
        name: {
            "milliseconds": round(1e3 * timing.median, 3),
            "quartiles": [round(1e3 * value, 3) for value in timing.quartiles],
            "of_eager": round(timing.ratio, 3),
            "measured": f"CPU, {threads} threads, one image of {bundle.size} px, median of {rounds} rounds",
        }
        for name, timing in timings.items()
    }
