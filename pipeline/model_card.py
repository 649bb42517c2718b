"""The README of an exported folder: how to load it, how near it is to eager, and what it comes from."""

from __future__ import annotations

from typing import Any


def model_card(described: dict[str, Any]) -> str:
    """The model card of an exported folder, from its export.json."""
    origin, side = described["provenance"], described["preprocessing"]["resize"][0]
    lines = [
        f"# {described['model']}",
        "",
        f"An image encoder: RGB in [0, 1], {side} px -> {described['output']['shape'][1]} channels, the "
        f"{described['output']['meaning']}. Resize images to {side} x {side} ({described['preprocessing']['interpolation']}); "
        "the normalisation is in the graph.",
        "",
        "## Load",
        "",
        *_snippets(described),
        "## Files",
        "",
        "| format | file | largest difference from eager, relative |",
        "|---|---|---|",
    ]
    for form, entry in described["formats"].items():
        parity = entry["parity"]
        shown = parity if isinstance(parity, str) else f"{parity['relative_error']:.1e}"
        lines.append(f"| {form} | `{entry['file']}` | {shown} |")
    lines += ["", "## Origin", "", *_origin(origin), ""]
    return "\n".join(lines)


def _origin(origin: dict[str, Any]) -> list[str]:
    if "teachers" not in origin:
        return [f"Weights: {origin.get('weights') or origin.get('model_uri') or 'unknown'}."]
    training = origin["training"]
    images = ", ".join(
        f"{d['images']} of `{d['location']}` (index SHA-256 {d['fingerprint'][:12]})" for d in origin["data"]
    )
    scores = ", ".join(f"{name} {score:.1f} %" for name, score in origin["knn"].items() if score is not None)
    return [
        "Distilled from these teachers, whose licences apply:",
        "",
        "| teacher | architecture | weights | licence |",
        "|---|---|---|---|",
        *(f"| {t['name']} | {t['architecture']} | {t['weights'][:32]} | {t['licence']} |" for t in origin["teachers"]),
        "",
        f"Images: {images}; {training['epochs']} epochs, {training['samples_seen']} images seen. MLflow run {origin['run_id']}.",
        "",
        f"kNN on held-out images (k = 20): {scores or 'not measured: no labels'}.",
        "",
        "It knows what its teachers know of images like these; nothing was measured on others.",
    ]


def _snippets(described: dict[str, Any]) -> list[str]:
    """Four lines for every file that loads without this project."""
    side, formats = described["preprocessing"]["resize"][0], described["formats"]
    snippets = {
        "torch_export": [
            "import torch",
            'model = torch.export.load("student.pt2").module()',
            f"images = torch.rand(2, 3, {side}, {side})",
            "features = model(images)",
        ],
        "onnx": [
            "import numpy, onnxruntime",
            'session = onnxruntime.InferenceSession("student.onnx")',
            f"images = numpy.random.rand(2, 3, {side}, {side}).astype(numpy.float32)",
            'features = session.run(None, {"image": images})[0]',
        ],
        "safetensors": [
            "import timm, torch  # and, for regla_*: import pipeline.student",
            f'model = timm.create_model("{described["model"]}", num_classes=0, checkpoint_path="student.safetensors").eval()',
            "# the normalisation of student.json comes first here",
        ],
    }
    return [line for form, code in snippets.items() if form in formats for line in ("```python", *code, "```", "")]
