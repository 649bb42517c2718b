"""Cut a view from decoded pixels and resize it once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.imaging.geometry import View
from teachers.base import Interpolation


def crop_and_resize(
    image: np.ndarray | Image.Image, view: View, size: tuple[int, ...], interpolation: Interpolation
) -> np.ndarray:
    """Cut the view's box, at whole pixels, from an RGB image, resize once with antialiasing, then flip.

    The resizing is torch's of 8-bit pixels, which is within one level of Pillow's and four times as fast.

    Args:
        image: [H, W, 3] uint8, or Pillow's.
        view: what is cut.
        size: (height, width) in pixels.
        interpolation: of the resizing.

    Returns:
        [3, height, width] uint8, contiguous, as torch's resizing gives it: numpy takes as long to turn it round.
    """
    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    (top, bottom), (left, right) = (
        _whole_pixels(view.box[axis], view.box[axis + 2], pixels.shape[1 - axis]) for axis in (1, 0)
    )
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    if planes.shape[1:] != size:
        planes = F.interpolate(planes[None], size, mode=interpolation, align_corners=False, antialias=True)[0]
    drawn: np.ndarray = (planes.flip(-1) if view.flip else planes).contiguous().numpy()
    return drawn


def _whole_pixels(start: float, end: float, length: int) -> tuple[int, int]:
    """The nearest pixels to a stretch given as fractions of a length; one at least."""
    first = min(round(start * length), length - 1)
    return first, max(round(end * length), first + 1)
