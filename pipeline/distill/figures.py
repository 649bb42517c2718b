"""PNG figures of a distillation, drawn after each evaluation: curves, and features as colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.shares import PRESENT
from pipeline.cache.read.reader import Batch
from pipeline.distill.distiller import Distiller
from pipeline.storage.atomic import atomic_write
from pipeline.training.task import History

IMAGES = 6
CELL = 96
"""Side of one image in the figure, in pixels."""


@dataclass(frozen=True)
class FigureWriter:
    """Draws figures into a folder.

    Attributes:
        folder: of the PNG files; on a cluster, one that all nodes share.
        teacher_knn: accuracy in percent by teacher, for comparison.
        earlier: evaluations of the phases before this one.
    """

    folder: str
    teacher_knn: Mapping[str, float] = field(default_factory=dict)
    earlier: Sequence[tuple[int, dict[str, float]]] = ()

    def draw(
        self,
        module: Distiller,
        evaluations: History,
        batch: Batch,
        codecs: Mapping[str, Mapping[str, FeatureCodec]] | None,
    ) -> None:
        """Replace both figures.

        Args:
            evaluations: of this phase, the first before training.
            batch: images to show, with features.
            codecs: decoders of these features by teacher id and kind; None: those of the training images.
        """
        # A phase begins with the evaluation at the end of the one before.
        curve = [*self.earlier, *evaluations[bool(self.earlier) :]]
        figures = {"curves": curves_figure(curve, self.teacher_knn), "features": features_figure(module, batch, codecs)}
        for name, figure in figures.items():
            with atomic_write(Path(self.folder, f"{name}.png")) as file:
                figure.savefig(file, dpi=110, format="png")


def curves_figure(evaluations: History, teacher_knn: Mapping[str, float]) -> Figure:
    """kNN accuracy by epoch of the averaged and the raw weights and, dashed, of the teachers (the paper's figure 3), and the
    cosine to every teacher on held-out images.
    """
    metrics = [metrics for _, metrics in evaluations]
    cosines = sorted({name for point in metrics for name in point if name.startswith("val_cosine/")})
    knn = any("knn" in point for point in metrics)
    count = max(1, knn + bool(cosines))
    figure = Figure(figsize=(5.4 * count, 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, count))
    marks: dict[str, Any] = {"marker": "o", "markersize": 3}
    if knn:
        panels[0].plot([point.get("knn") for point in metrics], label="averaged weights", **marks)
        panels[0].plot([point.get("knn_raw") for point in metrics], alpha=0.6, label="raw weights", **marks)
        for number, (name, score) in enumerate(teacher_knn.items()):
            panels[0].axhline(score, linestyle="--", linewidth=1, color=f"C{number + 2}", label=name)
        panels[0].set(ylabel="kNN accuracy, %")
    if cosines:
        for name in cosines:
            panels[-1].plot([point.get(name) for point in metrics], label=name.split("/", 1)[1], **marks)
        panels[-1].set(ylabel="cosine to the teacher on held-out images")
    for panel in panels if knn or cosines else ():
        panel.set(xlabel="epoch")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@torch.inference_mode()
def features_columns(
    module: Distiller, batch: Batch, codecs: Mapping[str, Mapping[str, FeatureCodec]] | None
) -> dict[str, Tensor]:
    """Pictures [B, h, w, 3] in [0, 1] of up to `IMAGES` images: the images, every teacher's patch features, and the student's
    predictions of them, by the name of the column; white where a teacher was not asked.

    Teacher and prediction share the teacher's colours, over all images, so that equal colours mean equal features. The
    student's own feature map has colours of its own.
    """
    device = module.weights.device
    count = min(IMAGES, len(batch.keys))
    images = batch.images[:count]
    output = module.student(images.to(device))
    columns = {"image": images.permute(0, 2, 3, 1).float().cpu() / 255}
    for label, target in module.labelled_targets():
        raw = {kind: rows[:count].to(device) for kind, rows in batch.features[target.teacher.id].items()}
        wanted = target.targets(raw, codecs[target.teacher.id] if codecs else None)["patches"].float().cpu()
        predicted = target.predict(output)["patches"].float().cpu()
        known = raw[PRESENT].bool().cpu() if PRESENT in raw else torch.ones(count, dtype=torch.bool)
        shown = colours(wanted[known] if known.any() else predicted, wanted, predicted)
        shown[0][~known] = 1.0
        columns |= {label: shown[0], f"student of {label}": shown[1]}
    own = output.feature_map.float().permute(0, 2, 3, 1).cpu()
    (columns["student's own"],) = colours(own, own)
    return columns


def features_figure(module: Distiller, batch: Batch, codecs: Mapping[str, Mapping[str, FeatureCodec]] | None) -> Figure:
    """The pictures of :func:`features_columns`, in columns."""
    columns = {name: enlarge(pictures) for name, pictures in features_columns(module, batch, codecs).items()}
    mosaic = torch.cat([*columns.values()], dim=1)
    figure = Figure(figsize=(1.25 * len(columns), 1.25 * len(mosaic) / CELL + 0.6), layout="constrained")
    panel = figure.subplots()
    panel.imshow(mosaic.numpy(), interpolation="nearest")
    panel.set_xticks([CELL * (number + 0.5) for number in range(len(columns))], list(columns), rotation=20, fontsize=8)
    panel.set_yticks([])
    panel.xaxis.tick_top()
    return figure


def colours(fitted: Tensor, *features: Tensor) -> list[Tensor]:
    """Three principal components as red, green and blue: features [B, h', w', D] each -> [B, h', w', 3] in [0, 1] each.

    The components are spherical (Locantore et al. 1999): those of the directions from the median, all of one length. A few
    patches of very large norm, as vision transformers have, would turn ordinary components towards themselves.

    Args:
        fitted: [B, h, w, D], determines the components and their ranges (2nd to 98th percentile).
    """
    vectors = fitted.flatten(0, 2)
    centre = vectors.median(dim=0).values
    _, _, axes = torch.linalg.svd(F.normalize(vectors - centre, dim=1), full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary; this one does not change from epoch to epoch.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    axes = F.pad(axes, (0, 0, 0, 3 - len(axes)))
    low, high = ((vectors - centre) @ axes.T).quantile(torch.tensor([0.02, 0.98]), dim=0)
    return [(((values - centre) @ axes.T - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for values in features]


def enlarge(pictures: Tensor) -> Tensor:
    """[B, h, w, 3] -> one column [B * CELL, CELL, 3]."""
    return F.interpolate(pictures.permute(0, 3, 1, 2), (CELL, CELL), mode="nearest").permute(0, 2, 3, 1).flatten(0, 1)
