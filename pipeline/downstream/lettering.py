"""Text in pictures: at a size that suits the picture, and in a font that has accents, Greek and Cyrillic letters."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEAST_TEXT, LEAST_WIDTH = 13, 160
"""Font size and width of lines in pixels, also below smaller pictures."""
MOST_HEIGHT = 4096
"""A picture that is higher is not widened to `LEAST_WIDTH`: it would become huge."""
TEXTS_PER_SIDE = 24
"""The short side of a large picture in font sizes."""
MOST_NAMES = 24
"""Names in a legend."""
GAP = 6
"""Pixels between pictures."""

Colour = tuple[int, int, int]


def text_size(picture: Tensor) -> int:
    """Font size in pixels for a picture [3, H, W]."""
    return max(LEAST_TEXT, min(picture.shape[-2:]) // TEXTS_PER_SIDE)


def lines_below(picture: Tensor, lines: Sequence[str]) -> Tensor:
    """Add lines of text below a picture uint8 [3, H, W], broken at spaces where they are wider than it."""
    font, width = _font(text_size(picture)), _width(picture)
    rows = [row for line in lines for row in _broken(line, width - font.size, font)]
    strip = _strip(width, len(rows), font)
    draw = ImageDraw.Draw(strip)
    for number, row in enumerate(rows):
        draw.text((font.size / 2, _top(number, font)), row, fill="black", font=font)
    return _stacked([picture, _pixels(strip)])


def legend_below(picture: Tensor, names: Mapping[str, Colour]) -> Tensor:
    """Add the colours and their names below a picture uint8 [3, H, W]; of more than `MOST_NAMES`, how many more there are."""
    font, width = _font(text_size(picture)), _width(picture)
    side = round(font.size)
    shown = [*names.items()][:MOST_NAMES]
    entries: list[tuple[str, Colour | None]] = [*shown]
    if more := len(names) - len(shown):
        entries.append((f"and {more} more", None))
    places, left, row = list[tuple[float, int]](), side / 2, 0
    for name, _ in entries:
        wide = 2 * side + font.getlength(name)
        if left > side and left + wide > width:
            left, row = side / 2, row + 1
        places.append((left, row))
        left += wide + side / 2
    strip = _strip(width, row + 1, font)
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, number) in zip(entries, places, strict=True):
        y = _top(number, font)
        if colour is not None:
            draw.rectangle((x, y + side * 0.15, x + side, y + side * 1.15), fill=colour, outline="black")
        draw.text((x + 1.4 * side, y), name, fill="black", font=font)
    return _stacked([picture, _pixels(strip)])


def side_by_side(pictures: Mapping[str, Tensor]) -> Tensor:
    """Pictures uint8 [3, H, W] of one size beside each other, each below its title."""
    columns: list[Tensor] = []
    for title, picture in pictures.items():
        font = _font(text_size(picture))
        strip = _strip(picture.shape[2], 1, font)
        ImageDraw.Draw(strip).text((2, _top(0, font)), title, fill="black", font=font)
        columns += [torch.full((3, 1, GAP), 255, dtype=torch.uint8)] if columns else []
        columns.append(torch.cat([_pixels(strip), picture], dim=1))
    height = max(column.shape[1] for column in columns)
    return torch.cat([column.expand(-1, height, -1) for column in columns], dim=2)


def draw_boxes(picture: Tensor, boxes: Tensor, names: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """Draw boxes over a picture uint8 [3, H, W], with names that stay within it; earlier ones are on top.

    Args:
        boxes: float [N, 4], x and y of two corners in pixels.
        names, colours: of each box.
    """
    size = max(LEAST_TEXT, text_size(picture) * 3 // 4)  # names hide what is below them
    font, image = _font(size), Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw, margin = ImageDraw.Draw(image), round(font.size / 6)
    objects = [*zip(boxes.tolist(), names, colours, strict=True)][::-1]
    for corners, _, colour in objects:
        draw.rectangle(corners, outline=colour, width=max(2, margin))
    for (left, top, _, _), name, colour in objects:
        width, height = font.getlength(name) + 2 * margin, font.size * 1.3
        x, y = max(0.0, min(left, image.width - width)), top - height if top >= height else max(0.0, top)
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + margin, y), name, fill=_ink(colour), font=font)
    return _pixels(image)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # a job that has just started draws nothing yet

    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _ink(colour: Colour) -> str:
    """Black or white, by the luminance of what is below it (ITU-R BT.601)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _width(picture: Tensor) -> int:
    _, height, width = picture.shape
    return width if height > MOST_HEIGHT else max(width, LEAST_WIDTH)


def _broken(line: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    rows, row = [], ""
    for word in line.split(" "):
        longer = f"{row} {word}" if row else word
        if row and font.getlength(longer) > width:
            rows.append(row)
            row = word
        else:
            row = longer
    return [*rows, row]


def _strip(width: int, rows: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    return Image.new("RGB", (width, round(_top(rows, font) + font.size / 4)), "white")


def _top(row: int, font: ImageFont.FreeTypeFont) -> float:
    return font.size * (0.15 + 1.4 * row)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[3, H, W] below each other, with white beside those that are not as wide as the widest."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2]), value=255) for part in parts], dim=1)
