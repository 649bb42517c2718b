"""A student with the head of SAM as two ONNX files, each compared with eager.

    sam_encoder.onnx    image [1, 3, S, S] float32 RGB in [0, 1] -> embedding [1, D, h, w]
    sam_decoder.onnx    embedding, points [1, N, P, 2], labels [1, N, P] -> logits [1, N, M, 4 h, 4 w], iou [1, N, M]
    prompts.json        their inputs and outputs

N prompts of P points each are open; both files are of one input size, since the exported grid is fixed. Points are shares of the
image at the centre of a pixel, and labels as in :class:`teachers.sam_prompts.PromptEncoder`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.graphs import INPUT, OPSET, export_onnx
from pipeline.runtime.logs import only_errors
from pipeline.student.folding import inference_form
from pipeline.student.loading import LoadedStudent
from pipeline.voices.prompts import fitting_masks
from pipeline.voices.sam_head import Embeddings, sam_embeddings
from teachers.sam_masks import INPUT_SIZE, SamMasks

ENCODER, DECODER, DESCRIPTION = "sam_encoder.onnx", "sam_decoder.onnx", "prompts.json"
TOLERANCE = 1e-4
"""Largest difference from eager that is allowed, relative to the largest output."""


def export_prompts(loaded: LoadedStudent, sam: str, folder: Path, size: int | None = None) -> dict[str, Any]:
    """Write both files and their description into a folder; returns the content of prompts.json.

    Args:
        sam: as in :func:`pipeline.voices.prompts.load_prompts`.
        size: side S of the input in pixels; None: as the student was trained.

    Raises:
        UserError, TeacherError: if the student has no SAM head, SAM's weights do not suit it, or an output differs from eager.
    """
    model = sam_embeddings(loaded)
    masks = fitting_masks(sam, model.label, model.dim, loaded.provenance.get("teachers", []))
    size = size or loaded.input_size or INPUT_SIZE
    folder.mkdir(parents=True, exist_ok=True)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = model(image)
    errors = {
        ENCODER: _encoder(model, image, embedding, folder / ENCODER),
        DECODER: _decoder(masks, embedding, folder / DECODER),
    }
    grid = list(embedding.shape[-2:])
    count = masks.mask_decoder.mask_tokens.num_embeddings
    described = {
        "student": loaded.name,
        "teacher": model.label,
        "provenance": dict(loaded.provenance),
        "input_size": size,
        "resize": "to a square, whatever the sides; bicubic, antialiased; RGB in [0, 1]; the normalisation is in the graph",
        ENCODER: {
            "inputs": {INPUT: [1, 3, size, size]},
            "outputs": {"embedding": [1, model.dim, *grid]},
            "relative_error": errors[ENCODER],
        },
        DECODER: {
            "inputs": {
                "embedding": [1, model.dim, *grid],
                "points": [1, "prompts", "points", 2],
                "labels": [1, "prompts", "points"],
            },
            "outputs": {
                "logits": [1, "prompts", count, *(4 * side for side in grid)],
                "iou": [1, "prompts", count],
            },
            "points": f"x / width + 0.5 / {INPUT_SIZE}, y / height + 0.5 / {INPUT_SIZE}, of pixels of the image",
            "labels": "1 on the object, 0 not on it; a box: 2 its top left and 3 its bottom right corner; points without a box: "
            "one more of label -1",
            "masks": "logits > 0, resized to the image (bilinear); mask 0 for boxes and several points, else the one of the "
            "highest iou among the others",
            "relative_error": errors[DECODER],
        },
        "tolerance": TOLERANCE,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2), encoding="utf-8")
    return described


def _encoder(model: Embeddings, image: Tensor, expected: Tensor, path: Path) -> float:
    fused = copy.deepcopy(model)
    encoder = fused.student.encoder
    encoder.backbone = inference_form(encoder.backbone, image)
    export_onnx(fused.eval(), path, image, (), ["embedding"])
    return _worst(path, {INPUT: image}, [expected])


def _decoder(masks: SamMasks, embedding: Tensor, path: Path) -> float:
    masks = copy.deepcopy(masks).cpu().eval()
    prompts, points = torch.export.Dim("prompts"), torch.export.Dim("points", min=2)
    with torch.no_grad(), only_errors("torch.onnx"):
        program = torch.onnx.export(
            masks,
            (embedding, *_prompts(3, 4)),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(None, {1: prompts, 2: points}, {1: prompts, 2: points}),
            input_names=["embedding", "points", "labels"],
            output_names=["logits", "iou"],
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
    worst = 0.0
    for count, length in ((1, 2), (5, 3)):
        given = _prompts(count, length)
        with torch.no_grad():
            expected = masks(embedding, *given)
        feeds = dict(zip(("embedding", "points", "labels"), (embedding, *given), strict=True))
        worst = max(worst, _worst(path, feeds, expected))
    return worst


def _prompts(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Random points and labels of all kinds."""
    random = torch.Generator().manual_seed(count)
    points = torch.rand(1, count, length, 2, generator=random)
    return points, torch.randint(-1, 4, (1, count, length), generator=random)


def _worst(path: Path, feeds: dict[str, Tensor], expected: Any) -> float:
    """Largest difference of a file's outputs from these, relative to the largest output; UserError if it is too large."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        difference = (torch.from_numpy(one) - other).abs().max() / other.abs().max().clamp_min(1e-12)
        worst = max(worst, difference.item())
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path.name}: differs from eager by {worst:.1e} of the largest output, more than {TOLERANCE:g}"
        )
    return worst
