"""Rank and collectives of a training process, and its shares of the global batch.

The global batch has as many equal shares as the run may have workers. A worker computes one share, or several in turn if
fewer workers are alive. Thus neither the global batch nor the order of the data depends on the number of workers: a run
that loses or regains workers within an epoch still sees every image once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")

STOP_REQUESTED = "stop"
"""The notice that makes training save and stop; after any other it only saves."""


class StoppedError(KeyboardInterrupt):
    """Training was asked to stop and has saved a checkpoint; jobs handle it as an interruption."""


@dataclass(frozen=True)
class Worker:
    """A training process.

    Attributes:
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
    dump: Callable[[str, dict[str, Any]], str | None] = lambda name, content: None

    @property
    def all_shares(self) -> int:
        """Shares of the global batch."""
        return self.shares or self.world

    @property
    def own_shares(self) -> range:
        """Numbers of this worker's shares."""
        return range(self.rank, self.all_shares, self.world)

    def pieces(self, images: int, most: int | None) -> list[int]:
        """Number of micro-batches of each own share of `images`, with at most `most` images per micro-batch (None: all).

        All workers run the same number of forwards per step, because SyncBN and DDP's reduction synchronise them. A share
        with fewer images than forwards repeats its last micro-batch with weight 0.
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
        """Tensors [B, ...] of all shares, in order, as [shares * B, ...] on every rank; B is the same on every rank."""
        if self.world == 1:
            return torch.cat(list(own))
        every = own[0].new_zeros(self.all_shares, *own[0].shape)
        every[self.rank :: self.world] = torch.stack(list(own))
        torch.distributed.all_reduce(every)
        return every.flatten(0, 1)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_reduce(torch.tensor(float(flag))))

    def all_gather_objects(self, items: list[Item]) -> list[Item]:
        """The items of all ranks, in the order of the ranks; tensors in them must be on the CPU."""
        if self.world == 1:
            return items
        every: list[list[Item]] = [[]] * self.world
        torch.distributed.all_gather_object(every, items)
        return [item for some in every for item in some]

    def broadcast_state(self, module: nn.Module) -> None:
        """Broadcast rank 0's parameters and buffers: without SyncBN, ranks differ in BatchNorm statistics."""
        if self.world > 1:
            for value in module.state_dict().values():
                torch.distributed.broadcast(value, 0)


def synchronised(worker: Worker) -> bool:
    """Whether BatchNorm's statistics are over the batches of all workers (SyncBN), which torch supports on GPUs only."""
    return worker.world > 1 and worker.device.type == "cuda"


ALONE = Worker()
"""A single process on the CPU."""
