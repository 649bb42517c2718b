"""Predictions of a fine-tuned model as files: JSON for programs, pictures for people.

predictions.json    classify: the likeliest classes of each image; segment: the file of each label map;
                    detect: a list in COCO's results format, whose ids are those of images.json
images.json         detect: `images` and `categories` in COCO's format
labels/             segment: a PNG for each image, with the number of the class of each pixel
pictures/           the prediction drawn over the image
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.predict.predictor import Predictor
from pipeline.storage.names import folder_name


def write_predictions(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Predict for image files, and write the results into a folder; returns the files and folders in it.

    Raises:
        UserError: if the folder cannot be made, or naming an unreadable image, unless `predictor.unreadable` collects them.
    """
    assert predictor.saved is not None
    task, classes, rows = predictor.saved.task, predictor.classes, []
    folders = [folder / name for name in task.folders]
    try:
        for made in folders:
            made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
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
    return [*(folder / name for name in documents), *folders]
