"""What an export starts from: a backbone, a student with the heads of its teachers, or a fine-tuned model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.kept_heads import StudentWithHeads, load_heads
from pipeline.downstream.saved import SavedModel
from pipeline.errors import UserError
from pipeline.export.graphs import OUTPUT
from pipeline.student.folding import inference_form
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import Encoder

FEATURES = "average of the last feature map"


@dataclass(frozen=True)
class ExportBundle:
    """A model to export.

    Attributes:
        name: readable.
        timm_name, args: what timm builds the backbone from.
        model: [B, 3, H, W] float32 RGB in [0, 1] -> a tensor, or a tuple of several; in evaluation mode, on the CPU.
        outputs: what each of them means, by name.
        size: side of the input in pixels that it is meant for.
        crop_share: of a resized image's side in the centre crop; None: the whole image is resized to a square.
        classes: of the logits, else none.
        provenance: of its origin, JSON-ready.
        heads: the heads that are kept, else None.
        saved: the fine-tuned model that it is, else None.
        classifier: as in :class:`~pipeline.downstream.base.ExportForm`.
    """

    name: str
    timm_name: str
    args: Mapping[str, Any]
    model: nn.Module
    outputs: Mapping[str, str]
    size: int
    crop_share: float | None = None
    classes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    heads: StudentWithHeads | None = None
    saved: SavedModel | None = None
    classifier: tuple[nn.BatchNorm1d, nn.Linear] | None = None

    @property
    def encoder(self) -> Encoder:
        """The backbone with its normalisation."""
        return _encoder(self.model)

    def fused(self) -> nn.Module:
        """A copy whose backbone is in its inference form: branches merged, BatchNorm folded."""
        whole = copy.deepcopy(self.model)
        encoder = _encoder(whole)
        encoder.backbone = inference_form(encoder.backbone, torch.rand(1, 3, self.size, self.size))
        return whole.eval()


def _encoder(model: nn.Module) -> Encoder:
    return next(module for module in model.modules() if isinstance(module, Encoder))


class _Heads(nn.Module):
    """The summary, then the predictions of every teacher's heads."""

    def __init__(self, whole: StudentWithHeads) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.whole.student.encode(images)
        answers = self.whole.predict_features(output)
        return output.summary, *(tensor for kinds in answers.values() for tensor in kinds.values())


def make_bundle(loaded: LoadedStudent, size: int, *, heads: bool = False) -> ExportBundle:
    """A backbone.

    Args:
        size: side of the input in pixels.
        heads: keep neck and heads too, so that it also predicts its teachers' features.

    Raises:
        UserError: if it is no student or timm model, or has no heads.
    """
    encoder = loaded.encoder
    if not isinstance(encoder, Encoder):
        raise UserError(f"{loaded.name}: is a graph already; only students and timm models are exported")
    name = loaded.name.removeprefix("timm/")
    bare = ExportBundle(name, name, loaded.args, encoder, {OUTPUT: FEATURES}, size, provenance=loaded.provenance)
    if not heads:
        return bare
    if loaded.folder is None:
        raise UserError(f"--heads: {loaded.name} is no distilled student, and has none")
    whole = load_heads(loaded.folder)
    outputs = {OUTPUT: FEATURES}
    for label, kinds in zip(whole.labels, whole.heads, strict=True):
        assert isinstance(kinds, nn.ModuleDict)
        outputs |= {f"{label}.{kind}": f"prediction of {label}'s features: {_KINDS[kind]}" for kind in kinds}
    return replace(bare, model=_Heads(whole).eval(), outputs=outputs, heads=whole)


_KINDS = {"summary": "its vector of the image", "patches": "its grid of patches, on the student's own grid"}


def make_task_bundle(saved: SavedModel, size: int | None = None) -> ExportBundle:
    """A fine-tuned model, if its task has an export form.

    Args:
        size: side of the input in pixels; None: as it was trained.

    Raises:
        UserError: if its task has none.
    """
    form, task = saved.task.export_form(saved.model), saved.task
    if form is None:
        raise UserError(
            f"a model that was fine-tuned for {task.name} is not exported: its task has no export form, as classify has; "
            "jobs/predict.py runs it"
        )
    return ExportBundle(
        f"{saved.backbone['model']} {'classifier' if saved.classes else task.name}",
        str(saved.backbone["model"]),
        saved.backbone["args"],
        saved.model,
        {form.output: form.meaning},
        size or task.config.student.input_size,
        form.crop_share,
        saved.classes,
        saved.provenance,
        saved=saved,
        classifier=form.classifier,
    )


def preprocessing(bundle: ExportBundle) -> dict[str, Any]:
    """How an image becomes the input, in words and in timm's terms."""
    size, share = bundle.size, bundle.crop_share
    how = "to a square, whatever the sides" if share is None else f"centre crop of {share:g} of the short side"
    return {
        "resize": [size, size],
        "interpolation": "bicubic, antialiased",
        "how": how,
        "crop_pct": 1.0 if share is None else share,
        "crop_mode": "squash" if share is None else "center",
        "normalisation": "in the graph",
        "mean": bundle.encoder.mean.flatten().tolist(),
        "std": bundle.encoder.std.flatten().tolist(),
    }
