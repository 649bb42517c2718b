"""Cut a view from decoded pixels and resize it once."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.imaging.geometry import View
from teachers.base import Interpolation


def crop_and_resize(
    image: np.ndarray | Image.Image, view: View, size: tuple[int, ...], interpolation: Interpolation
) -> np.ndarray:
    """Cut the view's box from an RGB image at whole pixels, resize once with antialiasing, then flip.

    Uses torch's 8-bit resizing, which is within one level of Pillow's and four times as fast.

    Args:
        image: [H, W, 3] uint8, or a Pillow image.
        size: (height, width) in pixels.

    Returns:
        [3, height, width] uint8, contiguous; channels first, because a transpose would take as long as the resizing.
    """
    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    (top, bottom), (left, right) = (
        _whole_pixels(view.box[axis], view.box[axis + 2], pixels.shape[1 - axis]) for axis in (1, 0)
    )
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    if planes.shape[1:] != size:
        planes = F.interpolate(planes[None], size, mode=interpolation, align_corners=False, antialias=True)[0]
    resized: np.ndarray = (planes.flip(-1) if view.flip else planes).contiguous().numpy()
    return resized


def _whole_pixels(start: float, end: float, length: int) -> tuple[int, int]:
    """First and last pixel (exclusive) nearest to an interval in fractions of `length`; at least one pixel."""
    first = min(round(start * length), length - 1)
    return first, max(round(end * length), first + 1)
