"""Linear segmentation: a 1x1 convolution on frozen maps, as in DINOv2's linear evaluation (section 7.4), without augmentation.

The whole image is resized to the encoder's square input. A 1x1 convolution commutes with bilinear interpolation, so that
training needs only `PIXELS` random labelled pixels per image at full resolution. Held-out logits are interpolated to the
size of each label map. Memory: two row groups of 64 maps, 2 * 64 * 4 h w D bytes, and one image's logits.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from pipeline.cache.read.scan import PatchReader
from pipeline.evaluate.linear import Batches, LinearHeads
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.progress import Progress
from pipeline.sources.label_maps import IGNORE, LabelMaps

PIXELS = 1024
"""Sampled pixels per image and training step."""

THREADS = 4
"""Threads that read label maps."""


def pixel_batches(groups: PatchReader, maps: LabelMaps, batch_size: int, seed: int, device: str) -> Batches:
    """Features [P, D] and classes [P] of random labelled pixels, from at most `batch_size` images of a row group per batch.

    Seed and epoch determine the pixels and the order of row groups and images.
    """

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([seed, epoch])
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(THREADS) as decoding:
            for ids, patches in map_ahead(reading, groups.read, rng.permutation(len(groups)).tolist(), ahead=1):
                order = rng.permutation(len(ids))
                for rows in np.split(order, range(batch_size, len(order), batch_size)):
                    labels = decoding.map(maps.read, [ids[row] for row in rows])
                    chosen = [_choose(rng, label) for label in labels]
                    features = patches[torch.from_numpy(rows)].to(device).permute(0, 3, 1, 2)
                    yield _at_pixels(features, chosen)

    return batches


def count_batches(groups: PatchReader, batch_size: int) -> int:
    """Batches of an epoch of :func:`pixel_batches`."""
    return sum(math.ceil(rows / batch_size) for rows in groups.sizes)


def _choose(rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (x, y) in [-1, 1] of random labelled pixels, float32 [P, 2], and their classes [P]; P = 0 without labels."""
    known = np.flatnonzero(labels != IGNORE)
    pixels = rng.choice(known, PIXELS) if len(known) else known
    height, width = labels.shape
    y, x = np.divmod(pixels, width)
    points = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=1)
    return points.astype(np.float32), labels.ravel()[pixels]


def _at_pixels(features: Tensor, chosen: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Maps [B, D, h, w] interpolated at the chosen coordinates of every image, and the classes there."""
    parts = [
        F.grid_sample(
            image[None],
            torch.from_numpy(points)[None, None].to(image.device),
            padding_mode="border",
            align_corners=False,
        )[0, :, 0].T
        for image, (points, _) in zip(features, chosen, strict=True)
    ]
    labels = np.concatenate([classes for _, classes in chosen])
    return torch.cat(parts), torch.from_numpy(labels).to(features.device)


@torch.inference_mode()
def confusions(heads: LinearHeads, groups: PatchReader, maps: LabelMaps, classes: int, device: str) -> Tensor:
    """Confusion matrices [G, K, K] of all classifiers, at the size of the label maps."""
    matrices = torch.zeros(len(heads.lrs), classes, classes, dtype=torch.int64)
    with (
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(THREADS) as decoding,
        Progress(sum(groups.sizes), "img", "segment") as progress,
    ):
        for ids, patches in map_ahead(reading, groups.read, range(len(groups)), ahead=1):
            for patch, labels in zip(patches, map_ahead(decoding, maps.read, ids, ahead=THREADS), strict=True):
                logits = heads(patch.to(device).flatten(0, 1)).permute(1, 2, 0).unflatten(2, patch.shape[:2])
                truth = torch.from_numpy(labels).to(device)
                for number, grid in enumerate(logits):
                    full = F.interpolate(grid[None], size=truth.shape, mode="bilinear")[0]
                    matrices[number] += multiclass_confusion_matrix(
                        full.argmax(dim=0), truth, classes, ignore_index=IGNORE, validate_args=False
                    ).cpu()
                progress.update()
    return matrices
