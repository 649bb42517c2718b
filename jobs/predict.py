"""Predict on images: features from a backbone; classes, label maps or objects from a fine-tuned model; and what a student
can do with the heads of its teachers (docs/students.md).

python jobs/predict.py work/runs/<run>/student photos/ --to features.parquet
python jobs/predict.py work/runs/<run>/model photos/ --to predictions
python jobs/predict.py models:/m-... a.jpg b.jpg --task detect
python jobs/predict.py work/runs/<run>/student photos/ --classes "a cat, a dog"
python jobs/predict.py work/runs/<run>/student photos/ --find "a red car"
python jobs/predict.py work/runs/<run>/student photos/ --like query.jpg
python jobs/predict.py work/runs/<run>/student photos/ --pca --to colours
python jobs/predict.py work/runs/<run>/student photos/ --parts 6 --to parts
python jobs/predict.py work/runs/<run>/student a.jpg b.jpg --match --keypoints 120,80 --to match
python jobs/predict.py work/runs/<run>/student photo.jpg --boxes 40,30,200,180 --sam sam_vit_b_01ec64.pth
python jobs/predict.py work/runs/<run>/student photos/ --everything --sam sam_vit_b_01ec64.pth
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import later, model_parser, name_left_out, run_parser, table, tracking_uri
from jobs._correspondences import add_correspondence_flags, asks_for_correspondences, predict_correspondences
from jobs._prompts import add_prompt_flags, asks_for_masks, predict_masks
from jobs._words import add_word_flags, asks_for_words, predict_words
from pipeline.downstream.config import TASKS


def task_name(text: str) -> str:
    """Check a value of `--task`."""
    if text not in ("features", *TASKS) and ":" not in text:
        raise argparse.ArgumentTypeError(f"there is no {text}; choose from features, {', '.join(TASKS)}")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, and print a table of the files and one line of JSON."""
    parser = model_parser(
        __doc__, "fine-tuned model or exported student folder, MLflow model URI (models:/m-...), or timm name"
    )
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders to search for them")
    task = parser.add_argument(
        "--task",
        type=task_name,
        help=f"features, {', '.join(TASKS)}, or package.module:Class; default: what the model was fine-tuned for, else features",
    )
    task.completer = lambda **_: ("features", *TASKS)  # type: ignore[attr-defined]
    parser.add_argument(
        "--to", type=Path, help="*.parquet or *.json for features (features.parquet), else a folder (predictions)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass; default: 32")
    parser.add_argument(
        "--min-score",
        type=float,
        help="objects: smallest score in [0, 1] that is written and drawn; default: all are written, and drawn from 0.5 on",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if available")
    add_word_flags(parser)
    add_correspondence_flags(parser)
    add_prompt_flags(parser)
    run_parser(parser, later("jobs.predict", "predict"), arguments)


if __name__ == "__main__":
    main()
    sys.exit()

from pipeline.errors import UserError
from pipeline.predict.features import check_features_file, write_features
from pipeline.predict.files import earlier_predictions, write_predictions
from pipeline.predict.images import find_images
from pipeline.predict.predictor import load_predictor

Voice = Callable[[argparse.Namespace], Mapping[str, Any]]

PLAIN = {"weights": "pretrained", "text_weights": None, "teacher": None, "batch_size": 32, "min_score": None}
"""Flags that not every voice uses, and their defaults."""
WITHOUT_SCORES = {"min_score": "only the objects of a detector have scores"}
IN_WORDS = {"weights": "a student with heads has its own", **WITHOUT_SCORES}
WITHOUT_TEXTS = {"text_weights": "no text is embedded", **WITHOUT_SCORES}
IN_PROMPTS = {
    **IN_WORDS,
    **WITHOUT_TEXTS,
    "teacher": "the head is that of SAM, of several the last",
    "batch_size": "images are prompted one by one",
}
UNUSED: dict[str, dict[str, str]] = {
    "classes": IN_WORDS,
    "find": IN_WORDS,
    "like": IN_WORDS | WITHOUT_TEXTS,
    "pca": WITHOUT_TEXTS,
    "match": WITHOUT_TEXTS,
    "parts": WITHOUT_TEXTS,
    "points": IN_PROMPTS,
    "boxes": IN_PROMPTS,
    "everything": IN_PROMPTS,
}
"""By what is asked for, the flags that it does not use, and why."""


def choose_voice(options: argparse.Namespace) -> Voice | None:
    """What is asked of the heads of a student's teachers, if anything is."""
    voices: dict[str, tuple[bool, Voice]] = {
        "words (--classes, --find, --like)": (asks_for_words(options), predict_words),
        "correspondences (--pca, --match, --parts)": (asks_for_correspondences(options), predict_correspondences),
        "prompts (--points, --boxes, --everything)": (asks_for_masks(options), predict_masks),
    }
    asked = {name: voice for name, (wanted, voice) in voices.items() if wanted}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: ask for one of them at a time")
    for name in ("teacher", "text_weights") if not asked else ():
        if getattr(options, name) is not None:
            takers = ", ".join(f"--{flag}" for flag, unused in UNUSED.items() if name not in unused)
            raise UserError(f"--{name.replace('_', '-')}: needs one of {takers}")
    refuse_unused(options)
    return next(iter(asked.values()), None)


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise a UserError for a flag that would be ignored by what is asked for."""
    for flag in (flag for flag in UNUSED if getattr(options, flag) not in (None, False)):
        for unused, why in UNUSED[flag].items():
            if getattr(options, unused) != PLAIN[unused]:
                raise UserError(f"--{unused.replace('_', '-')}: --{flag} does not use it ({why}); leave it out")


def predict(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write predictions for every readable image, and name the others."""
    if voice := choose_voice(options):
        return voice(options)
    if options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size}: at least 1")
    if options.min_score is not None and not 0 <= options.min_score <= 1:
        raise UserError(f"--min-score={options.min_score:g}: between 0 and 1")
    asked = options.task or ("features" if options.to and options.to.suffix else None)
    if asked == "features" and options.to:
        check_features_file(options.to)
    paths, left_out = find_images(options.images)
    predictor = load_predictor(
        options.model,
        weights=options.weights,
        input_size=options.size,
        device=options.device,
        batch_size=options.batch_size,
        tracking_uri=tracking_uri(options),
    )
    predictor.unreadable = {}
    task = asked or predictor.task or "features"
    if options.min_score is not None and (predictor.task != "detect" or task == "features"):
        raise UserError(f"--min-score: {WITHOUT_SCORES['min_score']}; leave it out")
    predictor.min_score = options.min_score
    if task == "features":
        file = options.to or Path("features.parquet")
        check_features_file(file)
        if file.exists():
            print(f"replacing {file}", flush=True)
        vectors = predictor.features([*paths])
        write_features(file, [*predictor.readable(paths)], vectors)
        count, channels = vectors.shape
        print(table({"images": count, "features": f"{file}, {channels} channels"}))
        figures: dict[str, Any] = {"file": str(file.resolve()), "images": count, "channels": channels}
    else:
        predictor.check_task(task)
        assert predictor.saved is not None
        folder = options.to or Path("predictions")
        if earlier := earlier_predictions(predictor.saved.task, paths, folder):
            print(f"replacing the {len(earlier)} files of an earlier prediction in {folder}", flush=True)
        written = write_predictions(predictor, predictor.saved.task, paths, folder, earlier)
        count = len(list(predictor.readable(paths)))
        print(table({"images": count, task: ", ".join(map(str, written))}))
        figures = {"task": predictor.task, "images": count, "files": [str(file.resolve()) for file in written]}
    return figures | name_left_out(left_out, predictor.unreadable)
