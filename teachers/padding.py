"""Features of the image alone out of the feature map of a padded one."""

import torch
from torch import Tensor


def average_unpadded(patches: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Area averages over the image's part of a feature map, a patch on its edge by the share that lies on the image.

    Args:
        patches: [B, h, w, D] of padded images.
        mask: [B, H, W] bool, false on padding, which lies right and below.
        grid: (h', w'), cells over the image; cell (i, j) covers the same share of it whatever its size.

    Returns:
        [B, h', w', D]. Of an image without padding, the plain averages of squares of patches if `grid` divides their number.
    """
    shares = (mask[:, :, 0].float().mean(dim=1), mask[:, 0].float().mean(dim=1))
    rows, columns = (
        _area_weights(share * patches.shape[axis], patches.shape[axis], grid[axis - 1])
        for axis, share in enumerate(shares, 1)
    )
    return torch.einsum("bir,bjc,brcd->bijd", rows, columns, patches)


def _area_weights(length: Tensor, patches: int, cells: int) -> Tensor:
    """[B, cells, patches]: the share of each cell that lies on each patch; the cells divide [0, length], length in patches."""
    edges = length[:, None] * torch.linspace(0, 1, cells + 1, device=length.device)
    start = torch.arange(patches, device=length.device)
    overlaps = torch.minimum(edges[:, 1:, None], start + 1) - torch.maximum(edges[:, :-1, None], start)
    overlaps = overlaps.clamp_(min=0)
    return overlaps / overlaps.sum(dim=-1, keepdim=True)
