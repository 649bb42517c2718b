"""Predictions of a fine-tuned model as files: JSON for programs, pictures for people.

predictions.json    classify: the likeliest classes of each image; segment: the file of each label map;
                    detect: a list in COCO's results format, whose ids are those of images.json
images.json         detect: `images` and `categories` in COCO's format
labels/             segment: a PNG for each image, with the number of the class of each pixel
pictures/           the prediction drawn over the image
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline.downstream.base import built_in_tasks
from pipeline.errors import UserError
from pipeline.storage.names import folder_name

_PICTURE = re.compile(r"[0-9]{5,}-.+\.png")


class Writes(Protocol):
    """How predictions become files; as the methods of the same names of :class:`~pipeline.downstream.base.DownstreamTask`."""

    @property
    def folders(self) -> tuple[str, ...]: ...  # noqa: D102
    def draw(self, image: Tensor, result: Any, classes: Sequence[str]) -> Tensor: ...  # noqa: D102
    def describe(  # noqa: D102
        self, image: Tensor, result: Any, classes: Sequence[str], folder: Path, stem: str
    ) -> dict[str, Any]: ...
    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]: ...  # noqa: D102


class Predicts(Protocol):
    """What predicts, such as a :class:`~pipeline.predict.predictor.Predictor`."""

    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102
    def predict_with_images(self, images: Any) -> Iterator[tuple[Tensor, Any]]: ...  # noqa: D102
    def readable(self, paths: Sequence[Path]) -> Iterator[Path]: ...  # noqa: D102


def earlier_predictions(task: Writes, images: Sequence[Path], folder: Path) -> list[Path]:
    """The files of an earlier prediction in a folder, by any built-in task or this one, which a new one replaces.

    Raises:
        UserError: if the folder has files of the same names that are not known to be predictions, or are now the images.
    """
    tasks = [*built_in_tasks(), task]
    names = {name for made in tasks for name in made.documents([], ())}
    found = [path for name in sorted(names) if (path := folder / name).is_file()]
    pictures = [*_pictures(folder, {name for made in tasks for name in made.folders})]
    if pictures and not (folder / "predictions.json").is_file():
        raise UserError(
            f"{pictures[0].parent}: holds pictures without a predictions.json beside it: name another folder with --to"
        )
    if inputs := {path.resolve() for path in images} & {path.resolve() for path in pictures}:
        raise UserError(
            f"{min(inputs)}: is an earlier prediction that would be replaced: name another folder with --to"
        )
    return [*found, *pictures]


def _pictures(folder: Path, names: set[str]) -> Iterator[Path]:
    for name in sorted(names):
        if (folder / name).is_dir():
            yield from sorted(path for path in (folder / name).iterdir() if _PICTURE.fullmatch(path.name))


def write_predictions(
    predictor: Predicts, task: Writes, paths: Sequence[Path], folder: Path, earlier: Sequence[Path] = ()
) -> list[Path]:
    """Predict for image files, and write the results into a folder; returns the files and folders in it.

    Args:
        earlier: files that are removed when all results are there.

    Raises:
        UserError: if the folder cannot be made, or naming an unreadable image, unless `predictor.unreadable` collects them.
    """
    try:
        for name in task.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        names = _write(predictor, task, paths, partial)
        for path in earlier:
            path.unlink(missing_ok=True)
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.replace(folder / path.relative_to(partial))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [*(folder / name for name in (*names, *task.folders))]


def _write(predictor: Predicts, task: Writes, paths: Sequence[Path], folder: Path) -> list[str]:
    """Write all results below a folder; returns the names of the documents."""
    classes, rows = predictor.classes, []
    for name in task.folders:
        (folder / name).mkdir(parents=True)
    # Predictions come first: each one implies that all unreadable files before its own are known.
    pairs = zip(predictor.predict_with_images([*paths]), predictor.readable(paths), strict=True)
    for number, ((image, result), path) in enumerate(
        tqdm(pairs, total=len(paths), unit="image", desc="predict", leave=False)
    ):
        stem = f"{number:05d}-{folder_name(path.stem)}"
        picture = task.draw(image, result, classes)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "pictures" / f"{stem}.png")
        rows.append({"path": str(path), **task.describe(image, result, classes, folder, stem)})
    documents = task.documents(rows, classes)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1), encoding="utf-8")
    return [*documents]
