"""How a student's token grid meets a teacher's patch grid: one declared rule per pair, printed at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GridRule:
    """Aligns tokens and patches on one grid.

    Exact where one grid divides the other: the finer is averaged. Otherwise the student's tokens are resized
    (bilinear), never the teacher's patches, whose statistics are frozen.

    Attributes:
        student, teacher: (h, w) of the two grids.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) on which they are compared."""
        return self.student if self._divides(self.student, self.teacher) else self.teacher

    @staticmethod
    def _divides(coarse: tuple[int, int], fine: tuple[int, int]) -> bool:
        return fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0

    def align_student(self, tokens: Tensor) -> Tensor:
        """[B, D, h, w] of the student -> [B, gh, gw, D]."""
        if self.grid == self.student:
            return tokens.permute(0, 2, 3, 1)  # an average of single tokens has a slow backward on a GPU
        if self._divides(self.grid, self.student):
            tokens = F.adaptive_avg_pool2d(tokens, self.grid)
        else:
            tokens = F.interpolate(tokens, size=self.grid, mode="bilinear", align_corners=False)
        return tokens.permute(0, 2, 3, 1)

    def align_teacher(self, patches: Tensor) -> Tensor:
        """[B, h, w, D] of the teacher -> [B, gh, gw, D]; an exact average or the identity."""
        if self.grid == self.teacher:
            return patches
        return F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), self.grid).permute(0, 2, 3, 1)

    def __str__(self) -> str:
        student, teacher, grid = ("x".join(map(str, size)) for size in (self.student, self.teacher, self.grid))
        if self.student == self.teacher:
            return f"{grid} for both"
        if self.grid == self.student:
            return f"teacher {teacher} averaged exactly to the student's {grid}"
        exact = self._divides(self.grid, self.student)
        return f"student {student} {'averaged exactly' if exact else 'resized (bilinear)'} to the teacher's {grid}"


def patch_subsets(grid: tuple[int, int], most: int | None) -> Tensor:
    """The places of a grid, dealt out to as few turns as have no more than `most` places each.

    A turn is a lattice that lies evenly over the grid: of two turns the fields of one colour of a chessboard; of four every
    fourth field of a row, two further in each next row. Neighbours, whose features are nearly the same, so come in different
    turns.

    Args:
        grid: (h, w).
        most: places of a turn; None: all places are one turn.

    Returns:
        [T, ceil(h * w / T)] int64, numbers of places row by row. All places occur; where they do not divide evenly, some
        occur in two turns.
    """
    height, width = grid
    count = 1 if most is None else -(-height * width // most)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dealt = ((max(1, count // 2) * rows + columns) % count).flatten().argsort(stable=True)
    starts = torch.arange(count) * len(dealt) // count
    return dealt[starts.unsqueeze(1) + torch.arange(-(-len(dealt) // count))]
