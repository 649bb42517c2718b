"""Pictures inside a page, as small JPEGs."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """A picture as a `data:` address, its size in pixels, and its caption."""

    source: str
    width: int
    height: int
    caption: str
    detail: str = ""


def picture(image: Image.Image, caption: str, detail: str = "", side: int | None = None) -> Picture:
    """An RGB image, reduced to a longest side of at most `side` pixels."""
    if side:
        image = image.copy()
        image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size, caption, detail)
