"""The linear segmentation probe of `jobs/evaluate.py seg-probe`, in this process and without a cache."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.frozen import map_levels
from pipeline.evaluate.linear import LinearHeads, train_heads
from pipeline.evaluate.segmentation import confusions, count_batches, pixel_batches
from pipeline.sources.label_maps import MaskFolder
from pipeline.student.model import Encoder
from pipeline.training.segmentation_scores import segmentation_scores

BATCH = 16
"""Images per forward pass and per step of the probe."""

LRS = (0.02, 0.1, 0.5)
"""Learning rates of the classifiers: a third of those of the job, since most of the time goes into full-size logits."""


@dataclass(frozen=True)
class MapsInMemory:
    """Names and maps of all images, read as by :class:`~pipeline.cache.read.scan.PatchReader`."""

    names: list[str]
    maps: Tensor

    @property
    def sizes(self) -> list[int]:
        """Images of every group."""
        return [len(self.names)]

    def __len__(self) -> int:
        return 1

    def read(self, number: int) -> tuple[list[str], Tensor]:
        """All names, and the maps [N, h, w, D]."""
        return self.names, self.maps


def segmentation_probe(encoder: Encoder, folder: Path, size: int, seed: int) -> dict[str, float]:
    """mIoU and pixel accuracy in percent of the learning rate with the best mIoU.

    Args:
        encoder: in eval mode.
        folder: with `images` and `masks`, each with `train` and `val`, in ADE20K's layout.
        size: side of the encoder's square input in pixels.
    """
    (train, truth), (val, expected) = (_maps(encoder, folder, split, size) for split in ("train", "val"))
    classes = max(truth.check(), expected.check())
    channels = train.maps.flatten(0, 2)
    heads = LinearHeads(channels.mean(0), channels.std(0), classes, LRS, seed)
    batches = pixel_batches(train, truth, BATCH, seed, "cpu")  # type: ignore[arg-type]
    with TemporaryDirectory() as kept, torch.enable_grad():
        steps = count_batches(train, BATCH)  # type: ignore[arg-type]
        train_heads(heads, batches, steps, EvaluateConfig().epochs, Path(kept, "probe.pt"), lambda epoch, losses: None)
    matrices = confusions(heads, val, expected, classes, "cpu")  # type: ignore[arg-type]
    scores = max((segmentation_scores(matrix)[0] for matrix in matrices), key=lambda found: next(iter(found.values())))
    return dict(scores)


@torch.inference_mode()
def _maps(encoder: Encoder, folder: Path, split: str, size: int) -> tuple[MapsInMemory, MaskFolder]:
    images = folder / "images" / split
    names = sorted(path.name for path in images.iterdir())
    found = []
    for first in range(0, len(names), BATCH):
        opened = [Image.open(images / name).convert("RGB") for name in names[first : first + BATCH]]
        resized = [pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)) for image in opened]
        levels = encoder.maps(torch.stack(resized).float() / 255, map_levels(encoder.strides))
        side = levels[0].shape[2:]
        sized = [F.interpolate(level, size=side, mode="bilinear", antialias=True) for level in levels]
        found.append(torch.cat(sized, dim=1).permute(0, 2, 3, 1))
    masks = MaskFolder(str(images), str(folder / "masks" / split), tuple(names))
    return MapsInMemory(names, torch.cat(found).float()), masks
