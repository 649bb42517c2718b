"""HOG as a teacher: histograms of oriented gradients as a distillation target, weight-free.

As in MaskFeat (Wei et al. 2022, section 3.2): 9 unsigned orientations, cells of 8 x 8 pixels, one histogram per colour
channel, L2-normalised, the cells of a patch concatenated. Gradients and hard binning as in Dalal and Triggs 2005 and
`skimage.feature.hog`. This file is also an example of a complete teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.base import Teacher, TeacherError, TeacherOptions, TeacherOutput, TeacherSpec
from teachers.variants import check_input_size

ORIENTATIONS = 9
CELL = 8
SUMMARY_GRID = 4


class HOG(Teacher):
    """Histograms of oriented gradients.

    Patches are squares of `pool` x `pool` cells with their histograms concatenated: [pool, pool, 3 channels, 9
    orientations] flattened. The summary is the same histograms averaged over a 4 x 4 layout of the image.

    Args:
        input_size: side of the input in pixels, a multiple of 8 `pool`.
        pool: cells along the side of a patch; MaskFeat's 16-pixel patches have 2.
    """

    def __init__(self, input_size: int, pool: int) -> None:
        check_input_size("hog", input_size, CELL * pool)
        self.spec = TeacherSpec(
            name="hog",
            architecture="hog/hog-9-orientations-8px",
            weights="none",
            input_size=(input_size, input_size),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            interpolation="bicubic",
            summary_dim=SUMMARY_GRID**2 * 3 * ORIENTATIONS,
            patch_dim=pool**2 * 3 * ORIENTATIONS,
            grid=(input_size // CELL // pool, input_size // CELL // pool),
            pool=pool,
            licence="none (computed)",
        )

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Nothing to load; histograms are always computed in float32."""
        self.device = torch.device(device)

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] RGB in [0, 1] -> summary [B, 432], patches [B, h, w, 27 pool^2]."""
        cells = cell_histograms(images.float())
        layout = F.adaptive_avg_pool2d(cells.flatten(1, 2), SUMMARY_GRID)
        batch, pool, (height, width) = len(images), self.spec.pool, self.spec.grid
        grouped = cells.view(batch, 3, ORIENTATIONS, height, pool, width, pool)
        patches = grouped.permute(0, 3, 5, 4, 6, 1, 2).reshape(batch, height, width, -1)
        return TeacherOutput(layout.flatten(1), patches)


def cell_histograms(images: Tensor, eps: float = 1e-5) -> Tensor:
    """Orientation histograms of every cell and channel: [B, C, H, W] float32 -> [B, C, 9, H / 8, W / 8].

    Central differences (0 on the border); the magnitude is added to one of 9 bins of unsigned orientation and averaged over
    the cell; then v / sqrt(|v|^2 + eps^2) per cell.
    """
    rows, columns = torch.zeros_like(images), torch.zeros_like(images)
    rows[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    columns[..., 1:-1] = images[..., 2:] - images[..., :-2]
    magnitude = torch.hypot(rows, columns)
    angle = torch.atan2(rows, columns).rad2deg().remainder(180)
    bins = (angle * (ORIENTATIONS / 180)).long().remainder(ORIENTATIONS)
    votes = images.new_zeros(*images.shape[:2], ORIENTATIONS, *images.shape[2:])
    votes.scatter_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
    histograms = F.avg_pool2d(votes.flatten(0, 1), CELL).unflatten(0, images.shape[:2])
    return histograms / (histograms.square().sum(dim=2, keepdim=True) + eps**2).sqrt()


def hog(options: TeacherOptions) -> Teacher:
    """Factory of :class:`HOG`; TeacherError for weights, arguments, a variant, or an unsuitable input size."""
    if options.variant or options.args or options.weights not in ("pretrained", "none"):
        raise TeacherError("teacher hog: it has no variants, weights or args, only input_size and pool")
    return HOG(options.input_size or 224, options.pool or 2)
