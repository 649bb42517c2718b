"""The jobs as functions: recipes and images in, trained models and metrics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regla.images import Images, locate

if TYPE_CHECKING:
    from pipeline.predict.predictor import Predictor
    from pipeline.runs.config import ImageJobConfig
    from pipeline.voices.prompts import Prompts
    from pipeline.voices.words import Words

Recipe = str | Path | Mapping[str, Any] | None
"""A YAML file, the name of a recipe of this package (`own_images.yaml`), its fields as a mapping, or None for the default."""

C = TypeVar("C", bound="ImageJobConfig")


@dataclass(frozen=True)
class TrainedModel:
    """The result of a distillation or fine-tuning.

    Attributes:
        folder: of the student or fine-tuned model.
        metrics: all figures that the job prints, by name.
        run_id: of the MLflow run.
        model_uri: of the model in MLflow's registry, or of the logged model if the store has no registry.
    """

    folder: Path
    metrics: dict[str, float]
    run_id: str
    model_uri: str

    def load(self, **options: Any) -> Predictor:
        """Load the model for prediction; `options` as in :func:`load_predictor`."""
        return load_predictor(self.folder, **options)


def distill(
    recipe: Recipe = None, *, images: Images | None = None, held_out: Images | None = None, **fields: Any
) -> TrainedModel:
    """Distil teachers into a student: fill the cache with missing features, train from it, measure kNN.

    An interrupted call resumes when it is repeated with equal arguments.

    Args:
        recipe: as :data:`Recipe`; None: generated scenes (`recipes/quickstart.yaml`).
        images: training images: a folder, .tar or .parquet files, or a list of image files, PIL images and RGB arrays uint8
            [H, W, 3]. A list is written once to a Parquet file in the work folder. None: `data.train` of the recipe.
        held_out: the same for the images that kNN is measured on; None: `data.val` of the recipe.
        fields: of the recipe, nested or dotted: ``train={"epochs": 5}``, ``**{"train.epochs": 5}``.

    Returns:
        The student. Its metrics include `knn_before` and `knn_after` in percent if the images have labels.

    Raises:
        UserError: for a field, image, weight file or store that cannot be used, in one line.
    """
    from jobs.distill import main
    from pipeline.distill.config import DistillJobConfig

    config = _configure(DistillJobConfig, "quickstart.yaml", recipe, images, held_out, fields)
    return _trained(main(config, False), "student")


def finetune(
    recipe: Recipe = None, *, images: Images | None = None, held_out: Images | None = None, **fields: Any
) -> TrainedModel:
    """Fine-tune a backbone for classification, segmentation, detection, or your own task.

    Args:
        recipe: as :data:`Recipe`; None: classification of generated scenes (`recipes/classify.yaml`).
        images, held_out, fields: as in :func:`distill`; ``finetune={"student": trained.folder}`` names the backbone.

    Returns:
        The fine-tuned model and its metrics on the held-out images.

    Raises:
        UserError: as :func:`distill`.
    """
    from jobs.finetune import main
    from pipeline.downstream.config import FinetuneJobConfig

    config = _configure(FinetuneJobConfig, "classify.yaml", recipe, images, held_out, fields)
    return _trained(main(config, False), "model")


def precompute(
    recipe: Recipe = None, *, images: Images | None = None, held_out: Images | None = None, **fields: Any
) -> dict[str, float]:
    """Fill the feature cache of a recipe: every teacher on every image, once.

    Args:
        recipe, images, held_out, fields: as in :func:`distill`.

    Returns:
        `shards_computed`, `images_extracted`, `quarantined` and `seconds`.

    Raises:
        UserError: as :func:`distill`.
    """
    from jobs.precompute import main
    from pipeline.cache.config import PrecomputeJobConfig

    return _numbers(main(_configure(PrecomputeJobConfig, "quickstart.yaml", recipe, images, held_out, fields), False))


def evaluate(
    name: str, recipe: Recipe = None, *, images: Images | None = None, held_out: Images | None = None, **fields: Any
) -> dict[str, float]:
    """Measure a backbone on frozen features.

    Args:
        name: `knn`, `linear`, `seg-probe`, `zero-shot`, `retrieval` or `promptable`.
        recipe, images, held_out, fields: as in :func:`distill`; ``evaluate={"student": trained.folder}`` names the backbone.

    Returns:
        The metrics by name, in percent.

    Raises:
        UserError: as :func:`distill`, or for another name.
    """
    from jobs.evaluate import EVALUATIONS, ROOTS
    from pipeline.errors import UserError
    from pipeline.evaluate.config import EvaluateJobConfig

    roots = {known: root for known, root in ROOTS.items() if issubclass(root, EvaluateJobConfig)}
    if name not in roots:
        raise UserError(f"evaluate: there is no {name}; choose one of {', '.join(roots)}")
    config = _configure(roots[name], "quickstart.yaml", recipe, images, held_out, fields)
    return _numbers(EVALUATIONS[name](config, False))


def load_predictor(model: str | Path, **options: Any) -> Predictor:
    """Load a model for prediction: features of a backbone, or what a fine-tuned model was made for.

    Args:
        model: folder of a student or fine-tuned model, MLflow model URI (`models:/...`), or timm name.
        options: `weights`, `input_size`, `device`, `batch_size` and `tracking_uri`, as in
            :func:`pipeline.predict.predictor.load_predictor`.

    Raises:
        UserError: if there is no such model or device.
    """
    from pipeline.predict.predictor import load_predictor

    return load_predictor(str(model), **options)


def load_words(student: str | Path, **options: Any) -> Words:
    """Load a student with the head of a CLIP teacher: it classifies by texts, and finds images by a text or an image.

    Args:
        student: exported folder or MLflow URI, distilled with `student.keep_heads=true`.
        options: `teacher`, `text_weights`, `input_size`, `device`, `batch_size` and `tracking_uri`, as in
            :func:`pipeline.voices.words.load_words`.

    Raises:
        UserError: if the student has no such head, or the weights of the text tower must be named.
    """
    from pipeline.voices.words import load_words

    return load_words(str(student), **options)


def load_prompts(student: str | Path, **options: Any) -> Prompts:
    """Load a student with the head of a SAM teacher: it cuts out what points and boxes name, or everything.

    Args:
        student: exported folder or MLflow URI, distilled with `student.keep_heads=true`.
        options: `sam`, `input_size`, `device` and `tracking_uri`, as in :func:`pipeline.voices.prompts.load_prompts`.

    Raises:
        UserError: if the student has no such head, or SAM's weights must be named.
    """
    from pipeline.voices.prompts import load_prompts

    return load_prompts(str(student), **options)


def _configure(
    root: type[C],
    default: str,
    recipe: Recipe,
    images: Images | None,
    held_out: Images | None,
    fields: Mapping[str, Any],
) -> C:
    from jobs._cli import find_recipe
    from pipeline.config.load import load_config
    from pipeline.runs.folder import work_folder

    tree = recipe if isinstance(recipe, Mapping) else find_recipe(str(recipe or default))
    config = load_config(root, tree, _plain(fields))
    given, folder = {"train": images, "val": held_out}, work_folder(config) / "images"
    located = {split: locate(value, folder) for split, value in given.items() if value is not None}
    return config.model_copy(update={"data": config.data.model_copy(update=located)})


def _plain(value: Any) -> Any:
    """A copy with all paths as text, since fields hold no paths."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _trained(figures: Mapping[str, Any], folder: str) -> TrainedModel:
    uri = figures["registered"] or figures["model_uri"]
    return TrainedModel(Path(figures[folder]), _numbers(figures), figures["mlflow_run_id"], uri)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
