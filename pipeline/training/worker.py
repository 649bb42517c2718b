"""This process among the training workers, and its shares of the global batch.

The global batch is cut into as many equal shares as the run may have workers, and the order of the data is that of the
shares. A worker computes one share, or several one after the other where fewer workers are alive. So neither the global
batch nor the order of the data depends on how many there are: a run that loses or regains workers in the middle of an
epoch sees every image that it would have seen, once.
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
"""The notice after which training saves and ends; any other is followed by saving alone."""


class StoppedError(KeyboardInterrupt):
    """Training was told to end, and has saved what a second start goes on from; to a job it is an interruption."""


def _nothing(name: str, content: dict[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class Worker:
    """This process among the training workers.

    Attributes:
        rank, world: of this process.
        device: where it computes.
        wrap: makes a module compute with those of the other workers; told whether each loss depends on all its parameters.
        shares: of the global batch, at least `world`; 0: one each.
        notice: why training should save now, `STOP_REQUESTED` why it should end, or None; called on all ranks alike.
        dump: writes a file of this name with this content beside the checkpoints, and returns where it lies.
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
        """Numbers of the shares that this worker computes."""
        return range(self.rank, self.all_shares, self.world)

    def pieces(self, images: int, most: int | None) -> list[int]:
        """Into how many pieces each of the own shares is cut.

        All workers run equally many forwards a step, since those of SyncBN and the last one's gradients wait for each
        other. Where that is more than a share has images, its last piece is computed again, without weight.

        Args:
            images: of a share.
            most: images of a piece; None: all.
        """
        each = math.ceil(images / (most or images))
        forwards = each * math.ceil(self.all_shares / self.world)
        own = len(self.own_shares)
        return [forwards // own + (number < forwards % own) for number in range(own)]

    def own_rows(self, count: int) -> range:
        """Of `count` rows that all ranks evaluate between them, this one's: every `world`-th."""
        return range(self.rank, count, self.world)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.world > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()

    def all_gather(self, own: Sequence[Tensor]) -> Tensor:
        """[shares * B, ...] on every rank: tensors [B, ...] of all shares of the global batch, in their order.

        Args:
            own: those of the own shares, of equal shapes on every rank, on the device.
        """
        if self.world == 1:
            return torch.cat(list(own))
        every = own[0].new_zeros(self.all_shares, *own[0].shape)
        every[self.rank :: self.world] = torch.stack(list(own))
        torch.distributed.all_reduce(every)
        return every.flatten(0, 1)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, so that all of them stop together."""
        return bool(self.all_reduce(torch.tensor(float(flag))))

    def earliest_failure(self, found: tuple[int, str, list[str]] | None) -> tuple[int, str, list[str]]:
        """What was found at the lowest step on any rank, on all of them; one at least has found something."""
        return min(item for item in self.all_gather_objects([found]) if item)

    def all_gather_objects(self, items: list[Item]) -> list[Item]:
        """The items of all ranks, on all of them, in the order of the ranks; tensors among them are on the CPU."""
        if self.world == 1:
            return items
        every: list[list[Item]] = [[]] * self.world
        torch.distributed.all_gather_object(every, items)
        return [item for some in every for item in some]

    def broadcast_state(self, module: nn.Module) -> None:
        """Give all ranks rank 0's parameters and buffers: without SyncBN each has BatchNorm statistics of its own."""
        if self.world > 1:
            for value in module.state_dict().values():
                torch.distributed.broadcast(value, 0)


ALONE = Worker()
"""The only one, on the CPU."""
