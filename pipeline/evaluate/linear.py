"""Linear classifiers on frozen features, one per learning rate, trained together.

As in DINOv2's linear evaluation (Oquab et al. 2023, appendix B.3): SGD with momentum 0.9, no weight decay, cosine decay to
zero, weights from N(0, 0.01), and the best learning rate on the held-out images. Features are first standardised as by
MAE's BatchNorm (He et al. 2022, appendix A.1), but over the whole training set. Images are not augmented, so that features
are computed once. Imports neither Ray nor MLflow.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipeline.runtime.progress import Progress
from pipeline.storage.atomic import atomic_write

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From the number of an epoch to its batches: features [B, D] float32 and labels [B] int64."""

CHUNK = 1024
"""Images per forward in evaluation."""


class LinearHeads(nn.Module):
    """G linear classifiers of K classes, one per learning rate, on features standardised by `mean` and `std` [D]."""

    mean: Tensor
    std: Tensor
    lrs: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int, lrs: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float().clamp_min(1e-6))
        self.register_buffer("lrs", torch.tensor(lrs))
        self.linear = nn.Linear(len(mean), len(lrs) * classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> logits [B, G, K]."""
        return self.linear((features - self.mean) / self.std).unflatten(1, (len(self.lrs), -1))

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy [G] of every classifier for features [B, D] and labels [B]; 0 where B is 0."""
        logits, heads = self(features).flatten(0, 1), len(self.lrs)
        losses = F.cross_entropy(logits, labels.repeat_interleave(heads), reduction="none")
        return losses.view(-1, heads).sum(dim=0) / max(1, len(labels))


def train_heads(
    heads: LinearHeads,
    batches: Batches,
    steps: int,
    epochs: int,
    state_file: Path,
    on_epoch: Callable[[int, list[float]], None],
) -> None:
    """Train all classifiers, from the last epoch in `state_file` if that exists.

    Args:
        steps: batches per epoch.
        on_epoch: called after every epoch with its number, from 1, and the mean loss of each classifier.
    """
    # One optimiser with learning rate 1 and losses weighted by their rates equals one optimiser per classifier: without
    # weight decay, momentum SGD is linear in the gradient.
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, epochs * steps)
    parts: dict[str, Any] = {"heads": heads, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = int(state["epoch"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    with Progress(epochs * steps, "step", f"train {len(heads.lrs)} classifiers", initial=first * steps) as progress:
        for epoch in range(first, epochs):
            total = torch.zeros_like(heads.lrs)
            for features, labels in batches(epoch):
                losses = heads.losses(features, labels)
                optimizer.zero_grad()
                (losses * heads.lrs).sum().backward()
                optimizer.step()
                schedule.step()
                total += losses.detach()
                progress.update()
            with atomic_write(state_file) as out:
                torch.save({"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, out)
            on_epoch(epoch + 1, (total / steps).tolist())


def shuffled(features: Tensor, labels: Tensor, batch_size: int, seed: int) -> Batches:
    """Batches of features [N, D], in an order determined by seed and epoch; the last one may be smaller."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch))
        for rows in order.to(features.device).split(batch_size):
            yield features[rows], labels[rows]

    return batches


@torch.inference_mode()
def accuracies(heads: LinearHeads, features: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Accuracy in percent of every classifier, as ``top1`` and ``top5``, on features [N, D] with labels [N]."""
    hits = torch.zeros(len(heads.lrs), 5, device=features.device)
    for chunk, expected in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = heads(chunk)
        best = logits.topk(min(5, logits.shape[2]), dim=2).indices
        hits[:, : best.shape[2]] += (best == expected[:, None, None]).sum(dim=0)
    shares = 100 * hits.cumsum(dim=1) / len(features)
    return {"top1": shares[:, 0].tolist(), "top5": shares[:, -1].tolist()}
