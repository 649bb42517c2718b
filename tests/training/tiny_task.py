"""A training task of milliseconds whose every batch is a function of (epoch, number, rank); Ray's workers import it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.training.task import Task
from teachers.base import digest_state

STEPS, BATCH = 6, 4


@dataclass(frozen=True)
class TinyBatch:
    keys: list[str]
    pixels: Tensor
    target: Tensor


class TinyNet(nn.Module):
    """Norms and biases, dropout, which makes a step depend on the random state, and a layer that nothing uses."""

    def __init__(self, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm: nn.Module = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(4, 2)
        self.past: Tensor
        self.register_buffer("past", torch.zeros(2))
        self.unused = nn.Linear(2, 2)  # as in timm's backbones, whose last layers serve their classifier alone
        self.dtypes: set[torch.dtype] = set()

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.conv(pixels)
        self.dtypes.add(features.dtype)
        return self.out(self.drop(self.norm(features)).mean(dim=(2, 3)))


class TinyTask(Task):
    """Regression on noise.

    Args:
        poison: rank to the number of the step of epoch 0, from 0 on, whose pixels are NaN on it.
        folder: where every rank writes down the batches that it takes and digests of its weights, or "".
        epochs_differ: whether epoch 1 has one step more than the others.
        delay: seconds that every batch takes longer.
        backend: of torch.compile, if the training is compiled; "" for its default, which takes a minute.
        refused_by: rank that finds in epoch 0 that something is as it must not be.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        *,
        dropout: float = 0.5,
        batch_norm: bool = True,
        poison: dict[int, int] | None = None,
        folder: str = "",
        epochs_differ: bool = False,
        refused_by: int | None = None,
        delay: float = 0.0,
        backend: str = "",
    ) -> None:
        self.rank, self.world, self.poison, self.folder = rank, world, poison or {}, folder
        self.epochs_differ, self.refused_by, self.delay = epochs_differ, refused_by, delay
        self._write("made", "made")
        torch.manual_seed(0)
        self.module = TinyNet(dropout, batch_norm)
        if backend:
            compile_with(self.module, backend)
        torch.manual_seed(1 + rank)
        self.judged: list[dict[str, Tensor]] = []

    def steps(self, epoch: int) -> int:
        return STEPS + (self.epochs_differ and epoch == 1)

    def batches(self, epoch: int, start: int) -> Iterator[TinyBatch]:
        if self.rank == self.refused_by:
            raise UserError("shard 7 is not as it should be")
        for number in range(start, self.steps(epoch)):
            time.sleep(self.delay)
            self._write("batches", f"{epoch}/{number}")
            parts = [self.batch(epoch, number, rank) for rank in self._ranks()]
            yield TinyBatch(
                [key for part in parts for key in part.keys],
                torch.cat([part.pixels for part in parts]),
                torch.cat([part.target for part in parts]),
            )

    def with_share(self, share: int) -> TinyTask:
        other = copy(self)
        other.rank = share
        return other

    def _ranks(self) -> list[int]:
        return [self.rank]

    def batch(self, epoch: int, number: int, rank: int) -> TinyBatch:
        rng = torch.Generator().manual_seed(1000 * epoch + 10 * number + rank)
        keys = [f"e{epoch}-b{number}-r{rank}-{i}" for i in range(BATCH)]
        batch = TinyBatch(keys, torch.randn(BATCH, 3, 8, 8, generator=rng), torch.randn(BATCH, 2, generator=rng))
        if epoch == 0 and self.poison.get(rank) == number:
            batch.pixels.fill_(float("nan"))
        return batch

    def loss(self, module: nn.Module, batch: TinyBatch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        self._write("weights", _parameter_digest(self.module))
        loss = F.mse_loss(module(batch.pixels).float(), batch.target)
        return loss, {"half": loss.detach() / 2}

    def after_step(self, batches: Sequence[TinyBatch]) -> None:
        """A sum to which every image contributes by its place in the global batch."""
        targets = self.worker.all_gather([batch.target for batch in batches])
        self.module.past.mul_(0.5).add_(torch.arange(1.0, 1 + len(targets)) @ targets)

    @torch.no_grad()
    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        self.judged.append({name: value.clone() for name, value in averaged.state_dict().items()})
        assert not averaged.training
        return {"score": float(averaged(torch.ones(2, 3, 8, 8)).abs().mean())}

    def _write(self, what: str, line: str) -> None:
        if self.folder:
            with Path(self.folder, f"{what}-{self.rank}").open("a") as file:
                file.write(f"{line}\n")


class WholeBatches(TinyTask):
    """One process that takes the batches of all shares at once."""

    def _ranks(self) -> list[int]:
        return list(range(self.world))


def compile_with(module: nn.Module, backend: str) -> None:
    """Let `module.compile()` use a backend; `aot_eager` captures forward and backward and generates no code."""
    module.compile = partial(module.compile, backend=backend)  # type: ignore[method-assign]


def _parameter_digest(module: nn.Module) -> str:
    return digest_state(nn.ParameterList(module.parameters()))


def make_tiny_task(payload: dict[str, Any], rank: int, world: int) -> TinyTask:
    return TinyTask(rank, world, **payload)


def lines(folder: Path, what: str, rank: int = 0) -> list[str]:
    """What a rank wrote down."""
    return (folder / f"{what}-{rank}").read_text().splitlines()
