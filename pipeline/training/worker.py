"""Rank and collectives of a training process, and its shares of the global batch.

The global batch is divided into as many equal shares as the run may have workers. A worker computes one share, or several
in turn if fewer workers are alive. So neither the global batch nor the order of the data depends on their number: a run
that loses or regains workers within an epoch still sees every image once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")

STOP_REQUESTED = "stop"
"""The notice on which training saves and ends; on any other it only saves."""


class StoppedError(KeyboardInterrupt):
    """Training was asked to stop and has saved a checkpoint; jobs handle it as an interruption."""


def _nothing(name: str, content: dict[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class Worker:
    """A training process.

    Attributes:
        rank, world: of the process.
        device: of its module.
        wrap: wraps a module for distributed training (DDP), given whether each loss depends on all parameters.
        shares: of the global batch, at least `world`; 0: one per worker.
        notice: a reason to save a checkpoint now, `STOP_REQUESTED` to stop as well, or None; called on all ranks alike.
        dump: writes a file of this name and content to the folder of the checkpoints, and returns its path.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module, bool], nn.Module] = lambda module, _: module
    shares: int = 0
    notice: Callable[[], str | None] = lambda: None
    dump: Callable[[str, dict[str, Any]], str | None] = _nothing

    @property
    def all_shares(self) -> int:
        """Shares of the global batch."""
        return self.shares or self.world

    @property
    def own_shares(self) -> range:
        """Numbers of this worker's shares."""
        return range(self.rank, self.all_shares, self.world)

    def pieces(self, images: int, most: int | None) -> list[int]:
        """Number of micro-batches of each of the own shares.

        All workers run equally many forwards per step, as SyncBN and the gradients of the last one synchronise them. If a
        share has fewer images than that, its last micro-batch is repeated with weight 0.

        Args:
            images: of a share.
            most: images per micro-batch; None: all.
        """
        each = math.ceil(images / (most or images))
        forwards = each * math.ceil(self.all_shares / self.world)
        own = len(self.own_shares)
        return [forwards // own + (number < forwards % own) for number in range(own)]

    def own_rows(self, count: int) -> range:
        """This rank's part of `count` rows that all ranks evaluate together: every `world`-th."""
        return range(self.rank, count, self.world)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.world > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()

    def all_gather(self, own: Sequence[Tensor]) -> Tensor:
        """Tensors [B, ...] of all shares, in order, as [shares * B, ...] on every rank.

        Args:
            own: tensors of the own shares, on the device, of the same shape on every rank.
        """
        if self.world == 1:
            return torch.cat(list(own))
        every = own[0].new_zeros(self.all_shares, *own[0].shape)
        every[self.rank :: self.world] = torch.stack(list(own))
        torch.distributed.all_reduce(every)
        return every.flatten(0, 1)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_reduce(torch.tensor(float(flag))))

    def earliest_failure(self, found: tuple[int, str, list[str]] | None) -> tuple[int, str, list[str]]:
        """The (step, message, keys) of the lowest step on any rank; at least one rank must have one."""
        return min(item for item in self.all_gather_objects([found]) if item)

    def all_gather_objects(self, items: list[Item]) -> list[Item]:
        """The items of all ranks, in the order of the ranks; tensors in them must be on the CPU."""
        if self.world == 1:
            return items
        every: list[list[Item]] = [[]] * self.world
        torch.distributed.all_gather_object(every, items)
        return [item for some in every for item in some]

    def broadcast_state(self, module: nn.Module) -> None:
        """Broadcast rank 0's parameters and buffers: without SyncBN, BatchNorm statistics differ by rank."""
        if self.world > 1:
            for value in module.state_dict().values():
                torch.distributed.broadcast(value, 0)


ALONE = Worker()
"""A single process on the CPU."""
