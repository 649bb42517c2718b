"""COCO segmentations: polygons, and run lengths as lists or as compressed text. Checked before pycocotools decodes them.

pycocotools allocates memory by the coordinates of a polygon and the size of a mask, and leaves the pixels that run lengths
do not reach uninitialised.
"""

from typing import Annotated, Any

import numpy as np
from pycocotools import mask as rle
from pydantic import Field, TypeAdapter, ValidationError

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A JSON number; neither NaN nor infinite, nor too large for a float64."""
_POLYGONS = TypeAdapter(list[Annotated[list[Finite], Field(min_length=6)]])
_LENGTHS = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]])
_SIZE = TypeAdapter(tuple[Annotated[int, Field(strict=True)], Annotated[int, Field(strict=True)]])
_MAX_CHARACTERS = 7
"""Of a compressed run length: 35 bits, more than any image needs."""


def has_shape(shape: Any) -> bool:
    """Whether an annotation has a segmentation; null, `[]` and `{}` mean none."""
    return shape is not None and shape != [] and shape != {}


def shown(value: Any) -> str:
    """A value of a file for a message, in moderate length."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def wrong_shape(shape: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation from a JSON file, on an image of this many pixels; None: :func:`encoded` takes it.

    The points of a polygon may lie outside of the image by at most its longer side: that part is cut off.
    """
    if isinstance(shape, list):
        return _wrong_polygons(shape, height, width)
    if not isinstance(shape, dict) or not {"size", "counts"} <= set(shape):
        return "that is neither polygons nor run lengths"
    try:
        size = _SIZE.validate_python(shape["size"])
    except ValidationError:
        return "whose `size` is not two whole numbers (height, width)"
    if size != (height, width):
        return f"of {shown(list(size))} pixels (height, width) on an image of {[height, width]}"
    if (lengths := run_lengths(shape["counts"])) is None:
        return "whose `counts` are damaged: neither a list of run lengths nor COCO's compressed text"
    if (total := int(lengths.sum())) != height * width:
        return (
            f"whose `counts` add up to {shown(total)} pixels, but the image has {height} x {width} = {height * width}"
        )
    return None


def _wrong_polygons(shape: list[Any], height: int, width: int) -> str | None:
    try:
        polygons = _POLYGONS.validate_python(shape)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "too_short":
            return "with a polygon of less than three points, or of half a point"
        return f"with a coordinate that {first['msg'].removeprefix('Input ')}, but is {shown(first['input'])}"
    margin = max(height, width)
    for polygon in polygons:
        if len(polygon) % 2:
            return "with a polygon of less than three points, or of half a point"
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -margin or max(values) > side + margin:
                far = max(values, key=lambda value: abs(value - side / 2))
                place = values.index(far)
                return (
                    f"with a point at ({polygon[2 * place]:g}, {polygon[2 * place + 1]:g}), far outside of its image of "
                    f"{width} x {height} pixels; up to {margin} pixels outside are cut off"
                )
    return None


def run_lengths(counts: Any) -> np.ndarray | None:
    """The run lengths in pixels, int64, of a list or of COCO's compressed text; None if they are damaged.

    The text holds numbers of five bits a character, lowest bits first, in the characters from code 48 on: bit 5 says that
    another character follows, and bit 4 of the last one is the sign. From the fourth on, a number is the difference to the run
    length two before.
    """
    if not isinstance(counts, str):
        try:
            return np.array(_LENGTHS.validate_python(counts), np.int64)
        except ValidationError:
            return None
    if not counts or not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() >= _MAX_CHARACTERS:
        return None
    lengths = np.add.reduceat((codes & 31) << 5 * place, first)
    lengths -= (codes[last] >> 4 & 1) << 5 * (place[last] + 1)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return None if lengths.min() < 0 else lengths


def encoded(shape: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation that :func:`wrong_shape` has passed, as compressed run lengths."""
    if isinstance(shape, list):
        return dict(rle.merge(rle.frPyObjects(shape, height, width)))
    if isinstance(shape["counts"], list):
        return dict(rle.frPyObjects(shape, height, width))
    return dict(shape)
