"""Predictions drawn over images, and the files of a report."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.downstream.base import Report
from pipeline.downstream.lettering import lines_below
from pipeline.storage.names import folder_name

LEAST_SIDE = 256
"""Short side in pixels to which smaller pictures are enlarged, so that their text is readable."""
MOST_SIDE = 4096
"""Long side in pixels beyond which nothing is enlarged."""


def palette(count: int) -> np.ndarray:
    """Colours that differ, uint8 [count, 3], as the PASCAL VOC colour map assigns them to class numbers from 1 on."""
    number = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((number >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def enlarge(pixels: Tensor) -> Tensor:
    """uint8 [3, H, W], repeated by a whole factor to a short side of at least `LEAST_SIDE`, unless it is very thin."""
    factor = scale_of(pixels.shape[-2:])
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def scale_of(size: Sequence[int]) -> int:
    """The factor by which :func:`enlarge` repeats an image of (height, width) pixels."""
    return max(1, min(-(-LEAST_SIDE // min(size)), MOST_SIDE // max(size)))


def caption(image: Tensor, lines: Sequence[str]) -> Tensor:
    """[3, H, W] float in [0, 1] -> uint8 [3, H', W'], enlarged if small, with lines of text below it."""
    return lines_below(enlarge((image.detach().float().clamp(0, 1) * 255).round().byte().cpu()), lines)


def write_report(report: Report, folder: Path, classes: Sequence[str]) -> None:
    """Write `per_class.csv`, `confusion.png` and `pictures/`, in place of those of an earlier evaluation."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    if report.per_class:
        with (folder / "per_class.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(report.per_class[0]))
            table.writeheader()
            table.writerows(report.per_class)
    if report.confusion is not None:
        confusion_figure(report.confusion, classes, folder / "confusion.png")
    for number, (key, picture) in enumerate(report.pictures.items()):
        name = f"{number:02d}-{folder_name(Path(key).stem)}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "pictures" / name)


def confusion_figure(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Plot int64 [K, K] as shares of each true class, with names for up to 40 classes."""
    from matplotlib.figure import Figure  # a job that has just started draws nothing yet

    shares = (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(12.0, 3.5 + 0.28 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    if len(classes) <= 40:
        panel.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        panel.set_yticks(range(len(classes)), classes, fontsize=7)
    panel.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=120)
