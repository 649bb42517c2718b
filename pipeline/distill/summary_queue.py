"""The queue of a teacher's past summaries, for losses such as `relation`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SummaryQueue(nn.Module):
    """The latest `size` summaries as unit vectors [dim]; part of the state dict, so a resumed run continues identically."""

    rows: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def entries(self) -> tuple[Tensor, Tensor]:
        """Summaries [Q, D], and [Q] bool, which of them are filled; `push` changes the summaries in place."""
        return self.rows, torch.arange(len(self.rows), device=self.rows.device) < self.count

    @torch.no_grad()
    def push(self, summaries: Tensor) -> None:
        """Replace the oldest entries by [B, D]."""
        latest = F.normalize(summaries.float(), dim=-1)[-len(self.rows) :]
        positions = (self.count + torch.arange(len(latest), device=latest.device)) % len(self.rows)
        self.rows[positions] = latest
        self.count += len(latest)
