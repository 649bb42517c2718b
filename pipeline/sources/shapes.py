"""Outlines of the object classes in sample scenes, and their antialiased coverage."""

import numpy as np
from PIL import Image, ImageDraw

_SUPERSAMPLING = 3
_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)


def _on_circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _polar(radii: list[float], start: float = -np.pi / 2) -> np.ndarray:
    """Corners at equal angles, clockwise from the top, at these distances from the centre."""
    angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return _on_circle(angles) * np.array(radii)[:, None]


def _crescent() -> np.ndarray:
    outer = _on_circle(np.linspace(0.25 * np.pi, 1.75 * np.pi, 36))
    centre = np.array([0.6, 0.0])
    tip = outer[0] - centre
    bend = np.arctan2(tip[1], tip[0])
    inner = _on_circle(np.linspace(2 * np.pi - bend, bend, 24))
    return np.concatenate([outer, centre + np.linalg.norm(tip) * inner])


def _heart() -> np.ndarray:
    across = 16 * np.sin(_TURN) ** 3
    down = -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN))
    return np.stack([across, down], 1)


_CROSS = [[1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1], [-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1]]

_OUTLINES: dict[str, list[np.ndarray]] = {
    "arrow": [np.array([[0, -3], [2.6, 0.2], [1, 0.2], [1, 3], [-1, 3], [-1, 0.2], [-2.6, 0.2]])],
    "crescent": [_crescent()],
    "cross": [np.array(_CROSS)],
    "disc": [_polar([1.0] * 48)],
    "heart": [_heart()],
    "hexagon": [_polar([1.0] * 6)],
    "ring": [_polar([1.0] * 48), _polar([0.55] * 48)],
    "square": [_polar([1.0] * 4, start=-np.pi / 4)],
    "star": [_polar([1.0, 0.42] * 5)],
    "triangle": [_polar([1.0] * 3)],
}

CLASSES = tuple(_OUTLINES)
"""Object classes by label, sorted by name."""


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _of_unit_area(outlines: list[np.ndarray]) -> list[np.ndarray]:
    """The outlines scaled to unit area and centred on their bounds, so that no class is larger or brighter than another."""
    outer = outlines[0]
    middle = (outer.min(0) + outer.max(0)) / 2
    area = _area(outer) - sum(map(_area, outlines[1:]))
    return [(outline - middle) / np.sqrt(area) for outline in outlines]


_UNIT = [_of_unit_area(outlines) for outlines in _OUTLINES.values()]


def coverage(label: int, centre: np.ndarray, extent: float, linear: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel that the object covers: float32 [size, size] in [0, 1].

    Args:
        centre: (x, y) in pixels.
        extent: square root of the object's area in pixels.
        linear: 2 x 2 matrix of determinant 1, rotation and stretch.
        size: side of the image in pixels.
    """
    fine = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    draw = ImageDraw.Draw(fine)
    for value, outline in zip((255, 0), _UNIT[label], strict=False):
        points = (outline @ linear.T * extent + centre) * _SUPERSAMPLING
        draw.polygon(points.ravel().tolist(), fill=value)
    return np.asarray(fine.reduce(_SUPERSAMPLING), np.float32) / 255
