"""The README of an exported folder: how to load it, its difference from eager, and its provenance."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.distill.provenance import all_licences, all_teachers
from pipeline.export.graphs import OUTPUT
from pipeline.export.hub import MAPS


def model_card(described: dict[str, Any]) -> str:
    """The model card of an exported folder, from its export.json."""
    shown = described["formats"].items()
    rows = [f"| {form} | `{entry['file']}` | {_parity(entry['parity'])} | {_latency(entry)} |" for form, entry in shown]
    eager = described["latency"]
    lines = [
        *_head(described),
        "## Load",
        "",
        *(line for form in described["formats"] for line in _block(described, form)),
        "## Files",
        "",
        "| format | file | largest difference from eager, relative | time of one image |",
        "|---|---|---|---|",
        *rows,
        "",
        *([f"Eager takes {eager['milliseconds']:.2f} ms ({eager['measured']}).", ""] if eager else []),
        *_tail(described),
    ]
    return "\n".join(lines)


def hub_card(described: dict[str, Any]) -> str:
    """The model card of the folder for the hub: front matter, then what timm's users need."""
    classifies = bool(described["classes"])
    licences = sorted({licence.lower() for licence in all_licences(described["provenance"])})
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification" if classifies else "image-feature-extraction",
        "tags": ["timm", "image-classification" if classifies else "image-feature-extraction", "distillation"],
        # What a student may be used for is for its maker to say; the teachers' licences are the known part.
        "license": licences[0] if len(licences) == 1 and licences[0] in _SPDX else "other",
    }
    if front["license"] == "other":
        front["license_name"] = "see-teachers"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        *_head(described),
        "## Load",
        "",
        *_block(described, "hf"),
        "`timm.utils.reparameterize_model(model)` brings it to its inference form.",
        "",
        *_tail(described),
    ]
    return "\n".join(lines)


_SPDX = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "bsd-3-clause")


def _head(described: dict[str, Any]) -> list[str]:
    steps = described["preprocessing"]
    side, outputs = steps["resize"][0], described["outputs"]
    tuned = outputs[0]["name"] != OUTPUT
    what = "An image classifier" if described["classes"] else "A fine-tuned model" if tuned else "An image encoder"
    lines = [
        f"# {described['model']}",
        "",
        f"{what}: RGB in [0, 1], {side} px -> {_shape(outputs[0])} ({outputs[0]['meaning']}). Images are resized "
        f"{steps['interpolation']}, {steps['how']}.",
        "",
    ]
    if len(outputs) > 1:
        lines += ["| output | shape | meaning |", "|---|---|---|"]
        lines += [f"| `{output['name']}` | {_shape(output)} | {output['meaning']} |" for output in outputs]
        lines += [""]
    if described["classes"]:
        names = described["classes"]
        listed = ", ".join(names[:30]) + (f", … ({len(names)} in export.json)" if len(names) > 30 else "")
        lines += [f"Classes, by number: {listed}.", ""]
    return lines


def _shape(output: dict[str, Any]) -> str:
    return " × ".join(str(side) for side in output["shape"][1:])


def _parity(parity: Any) -> str:
    return parity if isinstance(parity, str) else f"{parity['relative_error']:.1e}"


def _latency(entry: dict[str, Any]) -> str:
    if "latency" not in entry:
        return "as eager" if entry["file"] != "student.mlpackage" else "not measured here"
    latency = entry["latency"]
    return f"{latency['milliseconds']:.2f} ms, {latency['of_eager']:.2f} of eager"


def _block(described: dict[str, Any], form: str) -> list[str]:
    """Four lines that load one file, from inside its folder."""
    side = described["preprocessing"]["resize"][0]
    many = len(described["outputs"]) > 1
    output = described["outputs"][0]["name"]
    name = "features" if output == OUTPUT else output
    code: dict[str, list[str]] = {
        "torch_export": [
            "import torch",
            'model = torch.export.load("student.pt2").module()',
            f"images = torch.rand(2, 3, {side}, {side})  # RGB in [0, 1]; the normalisation is inside",
            f"{name}{', *heads' if many else ''} = model(images)",
        ],
        "onnx": [
            "import numpy, onnxruntime",
            'session = onnxruntime.InferenceSession("student.onnx")',
            f"images = numpy.random.rand(2, 3, {side}, {side}).astype(numpy.float32)  # RGB in [0, 1]",
            f'{name}{", *heads" if many else ""} = session.run(None, {{"image": images}}){"" if many else "[0]"}',
        ],
    }
    if form == "hf":
        code["hf"] = [
            f"import PIL.Image, timm{', regla  # regla.py lies next to the weights' if described['own_code'] else ''}",
            'model = timm.create_model("local-dir:.", pretrained=True).eval()',
            "images = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            '(PIL.Image.new("RGB", (640, 480)))[None]  # your picture here',
            f"{name} = {described['formats']['hf']['call']}",
        ]
        lead = ["With timm alone, from inside `hf`; uploaded, its name is `hf-hub:<owner>/<name>`:", ""]
    elif form == "safetensors":
        return [f"`{described['formats'][form]['file']}` is for this project: `load_predictor(folder)`.", ""]
    else:
        lead = []
    tail = [f"Maps, finest first, for a detector or a segmenter: `{MAPS}`.", ""] if form == "hf" else []
    return [*lead, "```python", *code[form], "```", "", *tail] if form in code else []


def _tail(described: dict[str, Any]) -> list[str]:
    return ["## Origin", "", *_origin(described["provenance"]), ""]


def _origin(origin: dict[str, Any]) -> list[str]:
    if "training" not in origin:
        return [f"Weights: {origin.get('weights') or origin.get('model_uri') or 'unknown'}."]
    lines = []
    if "student" in origin:  # fine-tuned
        scores = ", ".join(f"{name} {score:.4g}" for name, score in origin["metrics"].items())
        lines += [
            f"Fine-tuned on {_budget(origin)}.",
            "",
            f"On held-out images: {scores or 'not measured'}.",
            "",
        ]
        origin = origin["student"]
        if "teachers" not in origin:
            return [*lines, f"It started from weights: {origin.get('weights') or 'unknown'}."]
    scores = ", ".join(f"{name} {score:.1f} %" for name, score in origin["knn"].items() if score is not None)
    start = origin.get("start")
    return [
        *lines,
        "Distilled from these teachers, whose licences apply:",
        "",
        "| teacher | architecture | weights | licence |",
        "|---|---|---|---|",
        *(
            f"| {t['name']} | {t['architecture']} | {t['weights'][:32]} | {t['licence']} |"
            for t in all_teachers(origin)
        ),
        "",
        *([_start(start), ""] if start else []),
        f"Images: {_budget(origin)}.",
        "",
        f"kNN on held-out images (k = 20): {scores or 'not measured: no labels'}.",
        "",
        "Its features are those of its teachers on images like these; it was not measured on others.",
    ]


def _start(start: dict[str, Any]) -> str:
    if "training" in start:
        return f"It went on from the student `{start['named']}`, distilled on {_budget(start)}."
    return f"It started from the weights `{start['weights']}`, licence {start['licence']}."


def _budget(origin: dict[str, Any]) -> str:
    training = origin["training"]
    images = ", ".join(
        f"{d['images']} of `{d['location']}`"
        + (f" (index SHA-256 {d['fingerprint'][:12]})" if "fingerprint" in d else "")
        for d in origin["data"]
    )
    return (
        f"{images}; {training['epochs']} epochs, {training['samples_seen']} images seen. MLflow run {origin['run_id']}"
    )
