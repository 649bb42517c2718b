"""How an exported student is loaded: lines to paste."""

import json
import shlex
from pathlib import Path

from pipeline.runtime.ray_session import IS_INSTALLED


def loading_lines(folder: Path) -> dict[str, str]:
    """Lines that load an exported student, by library: this project, timm, and ONNX Runtime."""
    described = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    arguments = "".join(f", {name}={value!r}" for name, value in described["args"].items())
    own = "pipeline.student.regla, " if described["model"].startswith("regla") else ""
    export = "regla export" if IS_INSTALLED else "python jobs/export.py"
    student, weights, onnx = str(folder), str(folder / "student.safetensors"), folder.with_name("exported")
    return {
        "here": f"from regla import load_predictor; model = load_predictor({student!r})",
        "timm": f"import {own}timm; model = timm.create_model({described['model']!r}{arguments}, "
        f"checkpoint_path={weights!r})",
        "ONNX": f"{export} {shlex.quote(student)} --format onnx --to {shlex.quote(str(onnx))}",
    }
