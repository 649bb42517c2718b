"""The flags of the words that a student with a CLIP head understands, and what the jobs do with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import asked_flag, name_left_out, percent, table, tracking_uri

if TYPE_CHECKING:
    from pipeline.export.bundle import ExportBundle
    from pipeline.voices.config import WordsJobConfig
    from pipeline.voices.words import Words

FILE = Path("words.json")


def add_class_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags for classes as texts, of `predict` and `export`."""
    group = parser.add_argument_group(
        "words", "for a student distilled with a CLIP teacher and student.keep_heads=true"
    )
    group.add_argument(
        "--classes", help='"a cat, a dog", a .txt file with one on each line, or imagenet: classify by these texts'
    )
    group.add_argument(
        "--templates",
        nargs="+",
        help="put the classes into openai (80 sentences), simple (7), or texts with {}; default: the classes as they are",
    )
    group.add_argument(
        "--text-weights",
        help="weights of the text tower: pretrained, random[:seed], or a checkpoint file; default: the teacher's published ones",
    )
    group.add_argument(
        "--teacher", help="label of the teacher whose head is used, if the student keeps several of a kind"
    )
    return group


def add_word_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    group = add_class_flags(parser)
    group.add_argument("--find", metavar="TEXT", help="the images that are most like a text")
    group.add_argument("--like", metavar="IMAGE", type=Path, help="the images that are most like this one")
    group.add_argument("--top", type=int, help="classes of an image (5), or images of a search (10)")


def asks_for_words(options: argparse.Namespace) -> bool:
    """Whether `predict` is asked to classify by texts, or to search."""
    from pipeline.errors import UserError

    asked = asked_flag(options, ("classes", "find", "like"))
    if options.templates and options.classes is None:
        raise UserError("--templates: needs --classes, whose names are put into them")
    if options.top is not None and not asked:
        raise UserError("--top: needs --classes, --find or --like")
    if options.top is not None and options.top < 1:
        raise UserError(f"--top={options.top}: at least 1")
    return asked is not None


def predict_words(options: argparse.Namespace) -> Mapping[str, Any]:
    """Classify images by texts, or search them, and write a JSON file."""
    from pipeline.errors import UserError
    from pipeline.predict.features import check_features_file
    from pipeline.predict.images import find_images
    from pipeline.voices.words import load_words

    if options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size}: at least 1")
    file = options.to or FILE
    if file.suffix != ".json":
        raise UserError(f"--to: {file}: the name must end in .json")
    check_features_file(file)
    paths, left_out = find_images(options.images)
    words = load_words(
        options.model,
        teacher=options.teacher,
        text_weights=options.text_weights,
        input_size=options.size,
        device=options.device,
        batch_size=options.batch_size,
        tracking_uri=tracking_uri(options),
    )
    words.predictor.unreadable = {}
    rows = _classified(words, paths, options) if options.classes is not None else _found(words, paths, options)
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    figures: dict[str, Any] = {"file": str(file.resolve()), "images": len([*words.predictor.readable(paths)])}
    print(table({"images": figures["images"], "file": file}))
    return figures | name_left_out(left_out, words.predictor.unreadable)


def _classified(words: Words, paths: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline.voices.texts import AS_WRITTEN, read_classes

    classes = read_classes(options.classes)
    found = words.classify([*paths], classes, options.templates or AS_WRITTEN, options.top or 5)
    rows = zip(words.predictor.readable(paths), found, strict=True)
    return [
        {"path": str(path), "top": [{"class": name, "probability": share} for name, share in best]}
        for path, best in rows
    ]


def _found(words: Words, paths: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    top = options.top or 10
    by_text = options.find is not None
    found = words.find([*paths], options.find, top) if by_text else words.similar([*paths], options.like, top)
    rows = [{"path": str(hit.image), "cosine": hit.cosine} for hit in found]
    print(table({str(row["path"]): f"{row['cosine']:.3f}" for row in rows}))
    return rows


def word_classifier(options: argparse.Namespace) -> ExportBundle:
    """The classifier from words that `export` is asked for; leaves out formats that cannot hold it."""
    from pipeline.errors import UserError
    from pipeline.voices.classifier import FORMATS, classifier_bundle
    from pipeline.voices.heads import open_student
    from pipeline.voices.texts import AS_WRITTEN, read_classes

    if options.heads:
        raise UserError("--heads: the classifier from words has logits alone; leave out --heads or --classes")
    kept = [form for form in options.format if form in FORMATS]
    if not kept:
        raise UserError(f"--format: a classifier from words can be written as {', '.join(FORMATS)}")
    if lost := [form for form in options.format if form not in FORMATS]:
        print(f"left out: {', '.join(lost)}, which have no place for the classes' embeddings", flush=True)
    options.format = kept
    classes = read_classes(options.classes)
    student = open_student(options.model, tracking_uri(options))
    return classifier_bundle(
        student,
        options.size or student.input_size or 224,
        classes,
        options.templates or AS_WRITTEN,
        teacher=options.teacher,
        text_weights=options.text_weights,
    )


def zero_shot(config: WordsJobConfig, dry_run: bool) -> dict[str, Any]:
    """Accuracy of the student's CLIP head on data.val by the names of the classes, beside its teacher's own."""
    from pipeline.voices.measured import plan_words
    from pipeline.voices.zero_shot import class_names, zero_shot

    plan, words = plan_words(config), config.words
    classes = class_names(plan, words)
    about = f"{len(classes)} classes, templates {', '.join(words.templates)}"
    return _evaluate(config, dry_run, "zero-shot", plan, about, lambda made: zero_shot(made, classes, words.templates))


def retrieval(config: WordsJobConfig, dry_run: bool) -> dict[str, Any]:
    """Recall of images by captions and of captions by images on data.val, beside the teacher's own."""
    from pipeline.voices.measured import plan_words
    from pipeline.voices.retrieval import read_captions, retrieval

    captions = read_captions(config.words.captions)
    about = f"captions of {len(captions)} images from {config.words.captions}"
    return _evaluate(config, dry_run, "retrieval", plan_words(config), about, lambda made: retrieval(made, captions))


def _evaluate(config: WordsJobConfig, dry_run: bool, name: str, plan: Any, about: str, measure: Any) -> dict[str, Any]:
    """Compute the missing vectors, measure and log; an interrupted job resumes where it stopped."""
    from pipeline.cache.fill.estimate import check_space
    from pipeline.cache.fill.job import log_images
    from pipeline.runs.session import open_job
    from pipeline.voices.measured import compute_vectors, why_no_teacher

    student, teacher = config.evaluate.student, plan.teacher.name
    print(f"{name} of {student}, taught by {teacher}, on {plan.images.location}: {about}", flush=True)
    if plan.split.left_out:
        print(f"data.val left out: {'; '.join(plan.split.left_out)}", flush=True)
    if dry_run:
        return {"dry_run": True}
    check_space(plan.cache)
    with open_job(config, name) as job:
        log_images(plan.cache, job.run)
        plan = compute_vectors(plan, config)
        job.run.set_tags({"student": str(student), "encoder": plan.encoder.id, "teacher": teacher})
        job.run.set_student_run(plan.student_run)
        figures = measure(plan)
        job.run.log_metric_dict(figures)
    if not any(name.startswith("teacher_") for name in figures):
        print(f"no figure of the teacher: {why_no_teacher(plan)}", flush=True)
    counts = ("images", "captions")
    shown = {key: f"{value:g}" if key in counts else percent(value) for key, value in figures.items()}
    print(f"done\n{table({**shown, 'MLflow': f'{job.tracking_uri} run {job.run.run_id}'})}")
    return {**figures, "mlflow_run_id": job.run.run_id}
