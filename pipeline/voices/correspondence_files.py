"""Correspondences as files: pictures for people, JSON and label maps for programs.

pictures/      each image, and its patches in colours or parts to its right; match.png: two images and their matches
labels/        a PNG for each image, with the number of the part of each pixel
parts.json     the file of each label map, and the share of each part
match.json     pairs of points in pixels with their cosines, and the points transferred
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.predict.images import opened
from pipeline.predict.predictor import Predictor
from pipeline.storage.names import folder_name
from pipeline.voices.drawing import beside, draw_matches, palette
from pipeline.voices.matches import Matches, mutual_nearest, transfer
from pipeline.voices.parts import find_parts
from pipeline.voices.principal import principal_colours

DRAWN = 100
"""Matches in a picture at most, those with the largest cosines; the JSON file has all."""


def new_folder(folder: Path) -> None:
    """Make a folder; UserError if it holds anything: earlier files would be mixed with new ones."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty: name another folder with --to")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def write_colours(predictor: Predictor, paths: Sequence[Path], folder: Path) -> int:
    """Write the principal components of the patches of all readable images as pictures; returns their number."""
    maps, readable = _maps(predictor, paths)
    found = principal_colours(maps)
    for number, (path, colours) in enumerate(zip(readable, found.colours, strict=True)):
        _save(beside(opened(path), colours, Image.Resampling.BICUBIC), folder / "pictures" / _name(number, path))
    return len(readable)


def write_parts(predictor: Predictor, paths: Sequence[Path], count: int, folder: Path) -> int:
    """Write the parts of all readable images, found together, as pictures and label maps; returns their number.

    Raises:
        UserError: if there are fewer patches than parts, or a label map could not hold the numbers.
    """
    maps, readable = _maps(predictor, paths)
    patches = maps.shape[:3].numel()
    if not 2 <= count <= min(patches, 256):
        raise UserError(f"--parts={count}: from 2 to {min(patches, 256)} ({patches} patches)")
    colours, rows = palette(count), []
    for number, (path, labels) in enumerate(zip(readable, find_parts(maps, count), strict=True)):
        image, name = opened(path), _name(number, path)
        shown = torch.from_numpy(colours[labels.numpy()])
        _save(beside(image, shown, Image.Resampling.NEAREST), folder / "pictures" / name)
        pixels = Image.fromarray(labels.numpy().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        _save(pixels, folder / "labels" / name)
        shares = torch.bincount(labels.flatten(), minlength=count) / labels.numel()
        rows.append({"path": str(path), "labels": f"labels/{name}", "shares": shares.tolist()})
    _write(folder / "parts.json", rows)
    return len(readable)


def write_match(
    predictor: Predictor, paths: Sequence[Path], folder: Path, points: Sequence[tuple[float, float]] = ()
) -> int:
    """Match two images, and transfer points (x, y) in pixels from the first to the second; returns the number of matches.

    Raises:
        UserError: if there are not two images, one is unreadable, or a point is outside the first.
    """
    if len(paths) != 2:
        raise UserError(f"--match: needs two images, not {len(paths)}")
    images = [opened(path) for path in paths]
    sizes = [torch.tensor([image.size], dtype=torch.float32) for image in images]
    wanted = torch.tensor([*points], dtype=torch.float32).view(-1, 2)
    outside = ((wanted < 0) | (wanted > sizes[0])).any(dim=1)
    if outside.any():
        x, y = wanted[outside][0].tolist()
        raise UserError(
            f"--keypoints: {x:g},{y:g} is outside {paths[0]}, {images[0].width} x {images[0].height} pixels"
        )
    first, second = predictor.features([*images])
    found = mutual_nearest(first, second)
    carried = transfer(first, second, wanted / sizes[0]) * sizes[1]
    document = {
        "images": [str(path) for path in paths],
        "matches": [
            {"from": start, "to": end, "cosine": cosine}
            for start, end, cosine in zip(
                (found.first * sizes[0]).tolist(),
                (found.second * sizes[1]).tolist(),
                found.cosines.tolist(),
                strict=True,
            )
        ],
        "keypoints": [{"from": start, "to": end} for start, end in zip(wanted.tolist(), carried.tolist(), strict=True)],
    }
    _write(folder / "match.json", document)
    drawn = Matches(*(part[:DRAWN] for part in found))
    if points:
        drawn = Matches(wanted / sizes[0], carried / sizes[1], torch.ones(len(wanted)))
    _save(draw_matches(images[0], images[1], drawn), folder / "pictures" / "match.png")
    return len(found.cosines)


def _maps(predictor: Predictor, paths: Sequence[Path]) -> tuple[Tensor, list[Path]]:
    """The maps [N, h, w, D] of the readable images, and these."""
    maps = predictor.features([*paths])
    readable = [*predictor.readable(paths)]
    if not readable:
        raise UserError("there are no images that can be read")
    return maps, readable


def _name(number: int, path: Path) -> str:
    return f"{number:05d}-{folder_name(path.stem)}.png"


def _save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def _write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=1), encoding="utf-8")
