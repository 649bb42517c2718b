"""Decode images: encoded bytes to upright 8-bit RGB pixels, or to the class numbers of a label map."""

import io
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

MAX_PIXELS = 89_478_485
"""Maximum size of an image, checked before decoding: Pillow's default limit, which some libraries lift."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
"""Formats that untrusted bytes may have. Pillow's other decoders are riskier: the one for PostScript starts a program."""

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jpe", ".jfif", ".gif", ".apng", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of files in these formats, in lower case; in order of preference if a sample has several images."""

_WHITE_IS_ZERO = 0
"""Value of TIFF's tag PhotometricInterpretation for grey in which 0 is white; Pillow inverts only up to 8 bits."""

_ORIENTATION_MARKERS = (b"Exif\x00\x00", b"http://ns.adobe.com/xap/")
"""A JPEG with one of these may have an orientation."""

UPRIGHT = 1
"""EXIF's value for pixels that are stored as they are shown."""


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image to 8-bit RGB, upright by its EXIF orientation.

    Alpha is dropped, as in the loaders that teachers were trained with; for deep grey see :func:`to_rgb`. libjpeg reports
    no error for some damage inside JPEG scan data: such an image is accepted with smeared pixels.

    Raises:
        ValueError: if the image is truncated, corrupt, of an unknown format, of pixels without a known range, or has more
            than `MAX_PIXELS` pixels; the message is a short reason.
    """
    try:
        image = _open_within_limit(io.BytesIO(data))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("empty file" if not data else "not an image in a known format") from error
    except Exception as error:
        # Pillow's decoders raise different exceptions on damaged bytes: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be decoded: {error}") from error


def decode_label_map(data: bytes) -> np.ndarray:
    """The values [H, W] of an encoded label map: one channel or palette indices, of 1, 8, 16 or 32 bits.

    Raises:
        ValueError: if it is not a readable image, or has several channels or more than `MAX_PIXELS` pixels; the message is
            a short reason.
    """
    try:
        with _open_within_limit(io.BytesIO(data)) as image:
            numbers, mode = np.array(image), image.mode
    except Exception as error:  # as in `decode_image`
        raise ValueError(f"cannot be read: {error}") from error
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"has {mode} pixels; a label map has one channel of class numbers")
    return numbers.astype(np.uint8) if mode == "1" else numbers


def _open_within_limit(file: io.BytesIO) -> Image.Image:
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels is over the {MAX_PIXELS} allowed")
    return image


def image_size(data: bytes | BinaryIO) -> tuple[int, int]:
    """Upright (width, height) in pixels of an encoded image or of an open image file, read from its header."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
        # Pillow turns a TIFF while loading it, and announces the upright size before.
        stored = image.format != "TIFF"
        transposed = stored and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if transposed else (image.width, image.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB as :func:`decode_image` does. Grey of 12 or 16 bits keeps its upper eight bits.

    16-bit PNG and TIFF without a value over 4,095 are read as 12 bits: cameras store those unscaled, and the upper eight
    of 16 bits would be black. A dark image of 16 bits comes out 16 times as bright.

    Raises:
        ValueError: for pixels without a known range: floating point, and integers that are signed or of 32 bits.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # convert("RGB") would clip at 255: a photograph would turn white
        return Image.fromarray(_upper_bits(image)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store them with 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> np.ndarray:
    """The upper eight bits [H, W] uint8 of a grey image of more."""
    # The decoder of PPM scales what it reads to 16 bits, which Pillow holds in 32. Any other mode I is a TIFF (or an array)
    # of 32 or of signed bits, of which no header tells the largest value that is meant.
    if image.mode == "I" and image.format != "PPM":
        raise ValueError("integer pixels of 32 bits, or with a sign, have no known range; store them with 8 or 16 bits")
    levels = np.asarray(image).astype(np.uint16)  # in the byte order of this machine
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    depth = tags.get(BITSPERSAMPLE, (16,))[0]
    if depth == 16 and image.format in ("PNG", "TIFF", None) and levels.max() < 1 << 12:
        depth = 12
    eight: np.ndarray = (levels >> (depth - 8)).astype(np.uint8)
    return ~eight if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else eight


def decode_pixels(data: bytes) -> np.ndarray:
    """The pixels [H, W, 3] uint8 of :func:`decode_image`, faster for an upright JPEG; the same errors."""
    pixels = decode_upright_jpeg(data)
    return np.array(decode_image(data)) if pixels is None else pixels


def decode_upright_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels [H, W, 3] uint8 of an intact JPEG without orientation; None for anything that Pillow must decode.

    Pillow parses JPEG headers in Python, under the interpreter lock: on 16 cores, threads decoded 2,000 images a second,
    however many there were.
    """
    if not data.startswith(b"\xff\xd8") or _may_be_turned(data):
        return None
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if stored not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:  # Pillow accepts more damage, and reports the rest
        return None
    return pixels


def jpeg_orientation(data: bytes) -> int | None:
    """EXIF orientation of a JPEG, 1 to 8, as :func:`decode_image` applies it; None if Pillow cannot tell."""
    if not _may_be_turned(data):
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # noqa: BLE001  as in `decode_image`
        return None
    return value if value in range(UPRIGHT, 9) else UPRIGHT


def _may_be_turned(data: bytes) -> bool:
    return any(marker in data for marker in _ORIENTATION_MARKERS)
