"""How a student's feature map is aligned with a teacher's patches: one rule per pair, printed at the start."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GridRule:
    """Aligns the student's feature map and the teacher's patches on one grid.

    If one grid divides the other, the finer is averaged, which is exact. Otherwise the student's feature map is resized
    (bilinear), never the teacher's patches, whose statistics are frozen.

    Attributes:
        student, teacher: (h, w) of the two grids.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the comparison."""
        return self.student if self._divides(self.student, self.teacher) else self.teacher

    @staticmethod
    def _divides(coarse: tuple[int, int], fine: tuple[int, int]) -> bool:
        return fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0

    def align_student(self, features: Tensor) -> Tensor:
        """[B, D, h, w] of the student -> [B, gh, gw, D]."""
        if self.grid != self.student:  # pooling 1 x 1 squares has a slow backward pass on a GPU
            if self._divides(self.grid, self.student):
                features = F.adaptive_avg_pool2d(features, self.grid)
            else:
                features = F.interpolate(features, size=self.grid, mode="bilinear", align_corners=False)
        return features.permute(0, 2, 3, 1)

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
    """Divide the positions of a grid (h, w) into as few subsets as possible with at most `most` positions each (None: all).

    Each subset is a lattice over the whole grid: two subsets are the colours of a chessboard; of four, each takes every fourth
    position of a row, shifted by two in the next row. So neighbours, whose features are nearly the same, are in different
    subsets.

    Returns:
        [S, ceil(h * w / S)] int64, row-major positions. If they do not divide evenly, some occur in two subsets.
    """
    height, width = grid
    count = 1 if most is None else -(-height * width // most)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    order = ((max(1, count // 2) * rows + columns) % count).flatten().argsort(stable=True)
    starts = torch.arange(count) * len(order) // count
    return order[starts.unsqueeze(1) + torch.arange(-(-len(order) // count))]
