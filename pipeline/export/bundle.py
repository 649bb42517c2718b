"""What an export starts from: a backbone, a student with the heads of its teachers, or a fine-tuned model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.kept_heads import StudentWithHeads, load_heads
from pipeline.downstream.backbone import find_encoder
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
        name: for people.
        timm_name, args: what timm builds the backbone from.
        model: [B, 3, H, W] float32 RGB in [0, 1] -> a tensor or a tuple of them; in evaluation mode, on the CPU.
        outputs: the meaning of each output, by name.
        size: side of the input in pixels.
        crop_share, classifier: as in :class:`~pipeline.downstream.base.ExportForm`.
        classes: names of the logits, if any.
        provenance: JSON-ready.
        heads: the student with its kept heads, if they are exported.
        saved: the fine-tuned model, if it is one.
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
        return find_encoder(self.model)

    def fused(self) -> nn.Module:
        """A copy whose backbone is in its inference form: branches merged, BatchNorm folded."""
        whole = copy.deepcopy(self.model)
        encoder = find_encoder(whole)
        encoder.backbone = inference_form(encoder.backbone, torch.rand(1, 3, self.size, self.size))
        return whole.eval()


class _WithHeads(nn.Module):
    """[B, 3, H, W] -> the summary, then the predictions of every teacher's heads."""

    def __init__(self, whole: StudentWithHeads) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.whole.student.encode(images)
        predicted = self.whole.predict_features(output)
        return output.summary, *(tensor for kinds in predicted.values() for tensor in kinds.values())


def make_bundle(loaded: LoadedStudent, size: int, *, heads: bool = False) -> ExportBundle:
    """A backbone for inputs of `size` pixels; with its heads, it also predicts its teachers' features.

    Raises:
        UserError: if it is neither a student nor a timm model, or has no heads.
    """
    encoder = loaded.encoder
    if not isinstance(encoder, Encoder):
        raise UserError(f"{loaded.name}: is already a graph; only students and timm models can be exported")
    name = loaded.name.removeprefix("timm/")
    bare = ExportBundle(name, name, loaded.args, encoder, {OUTPUT: FEATURES}, size, provenance=loaded.provenance)
    if not heads:
        return bare
    if loaded.folder is None:
        raise UserError(f"--heads: {loaded.name} is not a distilled student, so it has no heads")
    whole = load_heads(loaded.folder)
    texts = {"summary": "its vector of the image", "patches": "its grid of patches, on the student's own grid"}
    outputs = {OUTPUT: FEATURES}
    for label, kinds in zip(whole.labels, whole.heads, strict=True):
        assert isinstance(kinds, nn.ModuleDict)
        outputs |= {f"{label}.{kind}": f"prediction of {label}'s features: {texts[kind]}" for kind in kinds}
    return replace(bare, model=_WithHeads(whole).eval(), outputs=outputs, heads=whole)


def make_task_bundle(saved: SavedModel, size: int | None = None) -> ExportBundle:
    """A fine-tuned model for inputs of `size` pixels (None: as trained); UserError if its task has no export form."""
    form, task = saved.task.export_form(saved.model), saved.task
    if form is None:
        raise UserError(
            f"a model fine-tuned for {task.name} cannot be exported: its task has no export form, unlike classify; "
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
