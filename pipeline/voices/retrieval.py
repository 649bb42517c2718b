"""Retrieval of captions by images and of images by captions: recall at 1, 5 and 10 (Radford et al. 2021)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.cache.read.scan import sample_names
from pipeline.errors import UserError, one_line
from pipeline.voices.measured import WordsPlan, student_embeddings, teacher_embeddings

RANKS = (1, 5, 10)
CHUNK = 1024
"""Queries that are ranked at a time: 4 CHUNK M bytes for M candidates."""


class Pairs(NamedTuple):
    """Captions with the image of each.

    Attributes:
        rows: of the images that have captions, among those of the data set [I].
        captions: all of them [C].
        image: number of each caption's image among `rows`, int64 [C].
    """

    rows: list[int]
    captions: list[str]
    image: Tensor


def read_captions(file: str | None) -> dict[str, list[str]]:
    """Captions by the file name of the image, from a file in COCO's layout: `images` with `id` and `file_name`, `annotations`
    with `image_id` and `caption`.

    Raises:
        UserError: for a file that cannot be read or has another layout.
    """
    if not file:
        raise UserError(
            "words.captions must be given: the captions of data.val in COCO's layout (captions_val2017.json)"
        )
    try:
        read = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in read["images"]}
        found: dict[str, list[str]] = {}
        for annotation in read["annotations"]:
            found.setdefault(names[annotation["image_id"]], []).append(str(annotation["caption"]).strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"words.captions: {file} is not in COCO's layout of captions ({one_line(f'{type(error).__name__}: {error}')})"
        ) from error
    if not found:
        raise UserError(f"words.captions: {file} has no captions")
    return found


def match(names: Sequence[str], captions: Mapping[str, Sequence[str]]) -> Pairs:
    """Join images, by their names or the last parts of these, with their captions.

    Raises:
        UserError: if no image has captions, or two images have the same file name.
    """
    rows: list[int] = []
    texts: list[str] = []
    image: list[int] = []
    for row, name in enumerate(names):
        own = captions.get(name) or captions.get(PurePosixPath(name).name)
        if own:
            texts += own
            image += [len(rows)] * len(own)
            rows.append(row)
    if not rows:
        raise UserError(
            f"words.captions: they name {len(captions)} images, such as {next(iter(captions))}, but none of data.val, such as "
            f"{names[0]}"
        )
    files = [PurePosixPath(names[row]).name for row in rows]
    if twice := next((name for name in files if files.count(name) > 1), None) if len({*files}) < len(files) else None:
        raise UserError(f"data.val: two images are called {twice}: their captions cannot be told apart")
    return Pairs(rows, texts, torch.tensor(image))


def retrieval(plan: WordsPlan, captions: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Recall in percent: `text_to_image_r1`, ..., `image_to_text_r10`, and the teacher's as `teacher_...` if they are cached.

    An image finds its captions if one of them is among the first; data.val is the pool of images, without those that have no
    captions.
    """
    pairs = match(sample_names(plan.images), captions)
    texts = plan.tower.embed(pairs.captions)
    figures = recalls(student_embeddings(plan)[0][pairs.rows], texts, pairs.image)
    if (own := teacher_embeddings(plan)) is not None:
        scores = recalls(own[pairs.rows], texts, pairs.image)
        figures |= {f"teacher_{name}": score for name, score in scores.items()}
    return {**figures, "images": float(len(pairs.rows)), "captions": float(len(pairs.captions))}


def recalls(images: Tensor, texts: Tensor, image: Tensor) -> dict[str, float]:
    """Recall in percent in both directions.

    Args:
        images, texts: embeddings [I, D] and [C, D] of length 1.
        image: number of each text's image [C].
    """
    found = {
        "text_to_image": _ranks(texts, images, image[:, None] == torch.arange(len(images))),
        "image_to_text": _ranks(images, texts, torch.arange(len(images))[:, None] == image),
    }
    return {
        f"{way}_r{rank}": 100 * (ranks < rank).float().mean().item() for way, ranks in found.items() for rank in RANKS
    }


def _ranks(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """Number of wrong candidates that are more like each query than its best right one [Q]; a tie counts against it."""
    parts = []
    for chunk, correct in zip(queries.split(CHUNK), right.split(CHUNK), strict=True):
        scores = chunk @ candidates.T
        best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
        parts.append(((scores >= best) & ~correct).sum(dim=1))
    return torch.cat(parts)
