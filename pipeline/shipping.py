"""A backbone as a folder that others can use: in the formats asked for, held against eager, described, with a model card.

    student.safetensors, student.json   weights as trained, and what timm builds the network from
    student.pt2                         torch.export; student.onnx: ONNX; student.mlpackage: Core ML
    export.json                         input, output, preprocessing, parity with eager, where the model comes from
    README.md                           the same for people

The graphs hold the normalisation and are in their inference form (branches merged, BatchNorm folded).
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.evaluate.folding import inference_form
from pipeline.export import INPUT, OUTPUT, export_coreml, export_onnx, export_torch
from pipeline.model_card import model_card
from pipeline.student.loading import Loaded
from pipeline.student.model import Encoder, load_encoder, save_encoder

Format = Literal["safetensors", "torch_export", "onnx", "coreml"]
FILES: dict[Format, str] = {
    "safetensors": "student.safetensors",
    "torch_export": "student.pt2",
    "onnx": "student.onnx",
    "coreml": "student.mlpackage",
}
TOLERANCE = 1e-4
"""Largest difference from eager that is allowed, relative to the largest output."""


def ship(loaded: Loaded, formats: Sequence[Format], folder: Path, size: int) -> dict[str, Any]:
    """Write a backbone in these formats into a folder.

    Args:
        loaded: the backbone; what it brings of its origin goes into the description.
        size: side of the input in pixels that it is meant for, and that Core ML is fixed to.

    Returns:
        What export.json says.

    Raises:
        UserError: where it cannot be exported, or a file does not give what eager gives.
    """
    encoder = loaded.encoder
    if not isinstance(encoder, Encoder):
        raise UserError(f"{loaded.name}: is a graph already; only students and timm models are exported")
    folder.mkdir(parents=True, exist_ok=True)
    # Height and width stay open from 33 pixels on (see export_torch), where the network takes them at all.
    fixed = size < 33 or encoder.backbone.pretrained_cfg.get("fixed_input_size", False)  # type: ignore[union-attr, operator]
    dynamic = (0,) if fixed else (0, 2, 3)
    fused = Encoder(inference_form(copy.deepcopy(encoder.backbone), torch.rand(1, 3, size, size))).eval()
    checks = [(1, size, size), (3, size, size) if fixed else (3, size + 32, size + 64)]
    described: dict[str, Any] = {
        "model": loaded.name,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, *([size, size] if fixed else ["height", "width"])],
            "dtype": "float32",
            "range": [0, 1],
            "channels": "RGB",
        },
        "output": {"name": OUTPUT, "shape": ["batch", encoder.dim], "meaning": "average of the last feature map"},
        "preprocessing": {
            "resize": [size, size],
            "interpolation": "bicubic, antialiased",
            "normalisation": "in the graph",
        },
        "formats": {},
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "provenance": loaded.provenance,
    }
    for form in formats:
        path = folder / FILES[form]
        run = _WRITERS[form](loaded, fused, path, size, dynamic)
        parity = _parity(encoder, run, checks, form) if run else "not run: Core ML needs macOS"
        described["formats"][form] = {"file": path.name, "parity": parity}
    (folder / "export.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(model_card(described), encoding="utf-8")
    return described


Run = Callable[[Tensor], Tensor]


def _safetensors(loaded: Loaded, fused: Encoder, path: Path, size: int, dynamic: Sequence[int]) -> Run:
    save_encoder(loaded.encoder, loaded.name, loaded.args, size, path.parent)
    return load_encoder(path.parent)


def _torch_export(loaded: Loaded, fused: Encoder, path: Path, size: int, dynamic: Sequence[int]) -> Run:
    export_torch(fused, path, _example(size, dynamic), dynamic)
    run: Run = torch.export.load(path).module()
    return run


def _onnx(loaded: Loaded, fused: Encoder, path: Path, size: int, dynamic: Sequence[int]) -> Run:
    import onnxruntime

    export_onnx(fused, path, _example(size, dynamic), dynamic)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _coreml(loaded: Loaded, fused: Encoder, path: Path, size: int, dynamic: Sequence[int]) -> None:
    export_coreml(fused, path, torch.rand(1, 3, size, size))


_WRITERS: dict[Format, Callable[[Loaded, Encoder, Path, int, Sequence[int]], Run | None]] = {
    "safetensors": _safetensors,
    "torch_export": _torch_export,
    "onnx": _onnx,
    "coreml": _coreml,
}


def _example(size: int, dynamic: Sequence[int]) -> Tensor:
    return torch.rand(2, 3, size, size + 32 if 3 in dynamic else size)


@torch.no_grad()
def _parity(eager: nn.Module, run: Run, shapes: Sequence[tuple[int, int, int]], form: str) -> dict[str, Any]:
    """Largest difference from eager over random images of these (batch, height, width), relative to the largest output."""
    worst = 0.0
    for batch, height, width in shapes:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        expected = eager(images)
        worst = max(worst, ((run(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item())
    if not worst <= TOLERANCE:
        raise UserError(f"{form}: differs from eager by {worst:.1e} of the largest output, more than {TOLERANCE:g}")
    return {"relative_error": worst, "tolerance": TOLERANCE, "shapes": [[b, 3, h, w] for b, h, w in shapes]}
