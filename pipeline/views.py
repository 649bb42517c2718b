"""Geometry that teachers and student share: decode once, cut a view from the original pixels, resize once."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from teachers.base import Interpolation

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own bound, kept here because libraries lift that one."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class View:
    """One view of an image.

    `box` is (left, top, right, bottom) as fractions of the upright image in [0, 1]; `flip` mirrors left and right after
    the cut.

    Raises:
        ValueError: the box is empty or leaves the image.
    """

    box: tuple[float, float, float, float]
    flip: bool = False

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"view box {self.box} is not left < right, top < bottom within [0, 1]")


FULL = View((0.0, 0.0, 1.0, 1.0))


def decode_image(data: bytes) -> Image.Image:
    """Decode all pixels of an encoded image to 8-bit RGB, upright by its EXIF orientation.

    Alpha is dropped, as the loaders that teachers were trained with do; 16-bit grey keeps its high byte. Pillow stays
    silent about bytes changed inside JPEG scan data that libjpeg decodes around: such an image passes, smeared.

    Raises:
        ValueError: truncated, corrupt, unknown format, or more than `MAX_PIXELS` pixels; the message is a short reason.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels is over the {MAX_PIXELS} allowed"
            )
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError("empty file" if not data else "not an image in a known format") from error
    except Exception as error:
        # Each of Pillow's decoders raises its own kinds on damaged bytes: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _high_byte(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    # convert("RGB") clips 16-bit grey at 255, which turns a photograph white.
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("integer pixels beyond 16 bits have no known range")
    return Image.fromarray((levels >> 8).astype(np.uint8))


def render(image: Image.Image, view: View, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Cut the view's box from the original pixels of an RGB image, resize once with antialiasing, then flip.

    `size` is (height, width) in pixels. Returns uint8 [height, width, 3], contiguous.
    """
    left, top, right, bottom = view.box
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    height, width = size
    resized = image.resize((width, height), _RESAMPLING[interpolation], box=box, reducing_gap=None)
    pixels = np.array(resized)
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels
