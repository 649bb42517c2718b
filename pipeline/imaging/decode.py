"""Decode images: encoded bytes -> upright 8-bit RGB pixels, or the class numbers of a label map."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own bound, kept here because libraries lift that one."""


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow's other decoders are kept away from what may be hostile: that of PostScript, for one, starts a program."""


_TURNED = (b"Exif\x00\x00", b"http://ns.adobe.com/xap/")
"""Of a JPEG that may say which way is up."""


_LABEL_MODES = ("1", "L", "P", "I", "I;16")


def decode_image(data: bytes) -> Image.Image:
    """Decode all pixels of an encoded image to 8-bit RGB, upright by its EXIF orientation.

    Alpha is dropped, as the loaders that teachers were trained with do; 16-bit grey keeps its high byte. Pillow stays
    silent about bytes changed inside JPEG scan data that libjpeg decodes around: such an image passes, smeared.

    Raises:
        ValueError: truncated, corrupt, unknown format, or more than `MAX_PIXELS` pixels; the message is a short reason.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels is over the {MAX_PIXELS} allowed"
            )
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("empty file" if not data else "not an image in a known format") from error
    except Exception as error:
        # Each of Pillow's decoders raises its own kinds on damaged bytes: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be decoded: {error}") from error


def read_label_map(path: str | Path) -> np.ndarray:
    """The numbers [H, W] that a label map's file holds: one channel or palette indices, of 1, 8, 16 or 32 bits.

    Raises:
        ValueError: no readable image, more than one channel, or over `MAX_PIXELS` pixels; the message is a short reason.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels is over the {MAX_PIXELS} allowed")
            numbers = np.array(image)
            mode = image.mode
    except Exception as error:  # as in `decode_image`
        raise ValueError(f"cannot be read: {error}") from error
    if mode not in _LABEL_MODES:
        raise ValueError(f"has {mode} pixels; a label map has one channel with the class's number")
    return numbers.astype(np.uint8) if mode == "1" else numbers


def image_size(data: bytes | str) -> tuple[int, int]:
    """(width, height) in pixels of an image that `decode_image` takes, or of its file, upright, without its pixels."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB pixels as :func:`decode_image` gives them.

    Raises:
        ValueError: for floating-point pixels, or integers beyond 16 bits.
    """
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


def decode_pixels(data: bytes) -> np.ndarray:
    """The pixels [H, W, 3] uint8 of :func:`decode_image`, at once where it is an upright JPEG.

    Raises:
        ValueError: as there.
    """
    pixels = decode_plain(data)
    return np.array(decode_image(data)) if pixels is None else pixels


def decode_plain(data: bytes) -> np.ndarray | None:
    """The pixels [H, W, 3] uint8 of an upright JPEG without damage, and None for all that Pillow must look at.

    Pillow takes a JPEG apart in Python, which threads cannot do beside each other: on 16 cores they decoded 2,000 images a
    second, whatever their number.
    """
    if not data.startswith(b"\xff\xd8") or any(mark in data for mark in _TURNED):
        return None
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if stored not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:  # Pillow reads more of what is damaged, and says what it cannot
        return None
    return pixels
