"""Pictures of what patches tell: colours, parts and matches over the images they belong to."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline.voices.matches import Matches

SIDE = 512
"""Height in pixels of a picture of matches, and length of the longer side of the others."""


def beside(image: Image.Image, values: Tensor, resample: Image.Resampling) -> Image.Image:
    """An image, and colours [h, w, 3] in [0, 1] at its size to its right."""
    shown = _fitted(image)
    pixels = Image.fromarray((values.numpy() * 255).round().astype(np.uint8)).resize(shown.size, resample)
    return _row([shown, pixels])


def palette(count: int) -> np.ndarray:
    """`count` colours of different hues, [count, 3] in [0, 1]."""
    return np.array([colorsys.hsv_to_rgb(number / count, 0.75, 0.95 - 0.25 * (number % 2)) for number in range(count)])


def draw_matches(first: Image.Image, second: Image.Image, matches: Matches) -> Image.Image:
    """Both images side by side, and a line for each match; its colour tells where in the first image it starts."""
    shown = [image.resize((max(1, round(image.width * SIDE / image.height)), SIDE)) for image in (first, second)]
    picture = _row(shown)
    draw, left = ImageDraw.Draw(picture), shown[0].width
    for (x, y), (to_x, to_y) in zip(matches.first.tolist(), matches.second.tolist(), strict=True):
        red, green, blue = colorsys.hsv_to_rgb(x, 0.9, 1.0 - 0.4 * y)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        ends = (x * left, y * SIDE), (left + to_x * shown[1].width, to_y * SIDE)
        draw.line(ends, fill=colour, width=1)
        for at_x, at_y in ends:
            draw.ellipse((at_x - 4, at_y - 4, at_x + 4, at_y + 4), fill=colour, outline="white")
    return picture


def _fitted(image: Image.Image) -> Image.Image:
    share = SIDE / max(image.size)
    return image.resize((max(1, round(image.width * share)), max(1, round(image.height * share))))


def _row(images: list[Image.Image]) -> Image.Image:
    picture = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        picture.paste(image, (left, 0))
        left += image.width
    return picture
