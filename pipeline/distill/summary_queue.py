"""The queue of a teacher's past summaries, with which `relation` compares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SummaryQueue(nn.Module):
    """The latest `size` summaries, as unit vectors; part of the state, so that a resumed run goes on alike.

    Args:
        size: summaries that are kept.
        dim: channels of a summary.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def past(self) -> tuple[Tensor, Tensor]:
        """The summaries [Q, D], and which places are filled [Q]; a push changes them in place."""
        return self.rows, torch.arange(len(self.rows), device=self.rows.device) < self.count

    @torch.no_grad()
    def push(self, summaries: Tensor) -> None:
        """Put [B, D] in the places of the oldest."""
        latest = F.normalize(summaries.float(), dim=-1)[-len(self.rows) :]
        places = (self.count + torch.arange(len(latest), device=latest.device)) % len(self.rows)
        self.rows[places] = latest
        self.count += len(latest)
