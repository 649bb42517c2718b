"""One typed configuration tree for every job: a YAML recipe, then dotted overrides.

    python jobs/distill.py recipes/quickstart.yaml train.epochs=5 student.name=regla_s teachers.0.weights=random

A recipe that names another beside it as its `base` gives only what differs; its `phases` are stages of the training,
each the fields that it changes. Every field has a type, a default and one line of meaning, which `--help` prints. An
unknown key, a wrong type or a value out of range raises :class:`~pipeline.errors.UserError` that names the key and,
where one is near, the right one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import UserError


class Section(BaseModel):
    """A group of fields; unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
"""In [0, 1]."""


def _some_points(value: Any) -> Any:
    if value == {}:
        raise ValueError("a schedule has one point at least, such as {0: 1}")
    return value


Schedule = Annotated[NonNegativeFloat | dict[Share, NonNegativeFloat], AfterValidator(_some_points)]
"""A weight, or weights by the share of the training that is behind them, linear in between: {0: 1, 0.5: 0.2}."""


class SamplesConfig(Section):
    """The generated sample scenes, used where `data.train` is `samples`."""

    train: int = Field(1000, ge=1, description="number of generated training scenes")
    val: int = Field(300, ge=0, description="number of generated held-out scenes")
    size: int = Field(96, ge=32, description="side of a generated scene in pixels")


class DataConfig(Section):
    """Where images come from."""

    train: str = Field(
        "samples", description="images to distil on: class folder, tar shards, Parquet, or `samples` (generated)"
    )
    val: str | None = Field(None, description="held-out images for kNN, in the same forms; none: no kNN")
    name: str | None = Field(None, description="readable name of the data in the cache; none: from the path")
    image_column: str | None = Field(None, description="Parquet column that holds the images; none: found by type")
    label_column: str | None = Field(None, description="Parquet column that holds the labels; none: label, fine_label")
    max_bad: float = Field(
        0.05, ge=0, le=1, description="share of unreadable images that is quarantined before the job stops"
    )
    samples: SamplesConfig = SamplesConfig()


class TeacherConfig(Section):
    """One teacher; a plain string in `teachers` is its `model`."""

    model: str = Field(
        description="dinov2[/vitb14_reg], clip[/ViT-L-14@openai], sam[/vit_b], hog, timm/<name>, student (an exported one) "
        "or package.module:factory"
    )
    weights: str = Field(
        "pretrained",
        description="pretrained, random[:seed] (untrained), a checkpoint file, or the folder of an exported student",
    )
    input_size: int | None = Field(None, ge=1, description="side of the teacher's input in pixels; none: as published")
    pool: int | None = Field(None, ge=1, description="side of the square of patches averaged into one; none: default")
    args: dict[str, Any] = Field({}, description="arguments passed to the library's model constructor")
    codec: str | None = Field(None, description="how its features are stored; none: cache.codec")
    weight: Schedule = Field(
        1.0,
        description="weight of this teacher in the loss; {0: 1, 0.5: 0.2}: by the share of the training done, linear",
    )
    summary_weight: Schedule = Field(1.0, description="weight of its summary loss within it, in the same forms")
    patch_weight: Schedule = Field(1.0, description="weight of its patch loss within it, in the same forms")


class ViewsConfig(Section):
    """Which views of the training images are cached; held-out images are always whole."""

    crops: int = Field(
        0, ge=0, description="random resized crops of each image, cached as such; 0: the whole image once"
    )
    min_area: float = Field(0.35, gt=0, le=1, description="smallest share of the image's area in a crop")
    max_ratio: float = Field(4 / 3, ge=1, description="largest ratio of a crop's sides")
    flip: float = Field(0.5, ge=0, le=1, description="probability that a crop is mirrored")
    per_step: int = Field(1, ge=1, description="crops of an image in one step, for which it is decoded once")


class CacheConfig(Section):
    """The feature cache and how it is filled."""

    uri: str | None = Field(None, description="folder of the cache; none: <work>/cache")
    shard_size: int = Field(512, ge=1, description="images per shard: the unit of extraction, commit and resume")
    codec: str = Field(
        "pca-int8-zstd", description="how features are stored: [pca[<k>]-]<number format>[-zstd]; see docs/cache.md"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic of the teachers' forward")
    batch_size: int = Field(32, ge=1, description="images per teacher forward")


class StudentConfig(Section):
    """The network that learns."""

    name: str = Field("regla_t", description="regla_t, regla_s, regla_m, regla_l, regla_xl, or timm/<name>")
    weights: str = Field(
        "random",
        min_length=1,
        description="that a distillation starts from: random (by seed), pretrained (timm's), a checkpoint file, or an exported "
        "student: its folder, address or MLflow URI",
    )
    input_size: int = Field(256, ge=16, description="side of the student's input in pixels")
    args: dict[str, Any] = Field({}, description="arguments passed to timm.create_model")
    token_dim: int = Field(256, ge=1, description="channels of the tokens that the neck fuses for the patch heads")
    taps: list[Literal[4, 8, 16, 32]] = Field(
        [16, 32],
        min_length=1,
        description="strides of the pyramid that the neck fuses into tokens of stride 16; 16 is always among them",
    )
    head_dim: int = Field(1024, ge=1, description="hidden channels of the distillation heads")
    keep_heads: bool = Field(False, description="export neck and heads too, beside the student")


class LossConfig(Section):
    """How the student's predictions are compared with the teachers' features: see pipeline/distill/loss.py."""

    standardise: Literal["mean_std", "phi_s"] = Field(
        "mean_std", description="targets: by each channel's deviation, or rotated to one scale (PHI-S)"
    )
    patches: dict[str, NonNegativeFloat] = Field(
        {"cosine": 0.9, "smooth_l1": 0.1},
        min_length=1,
        description="weight of each loss of a patch: cosine, smooth_l1, mse",
    )
    summary: dict[str, NonNegativeFloat] = Field(
        {"cosine": 1.0},
        min_length=1,
        description="weight of each loss of a summary: the same, and relation (to a queue of past ones)",
    )
    max_patches: int | None = Field(
        64, ge=1, description="most patches of an image that are compared in a step, others in the next; none: all"
    )
    queue: int = Field(4096, ge=1, description="past summaries of each teacher that relation compares with")
    temperature: float = Field(0.07, gt=0, description="temperature of relation's softmax")
    drop: Share = Field(
        0.0, description="teacher dropping: of an image the worst is kept, each other dropped with this"
    )


class AugmentConfig(Section):
    """Photometric augmentation of the student's images; the teachers saw the clean view."""

    jitter: Share = Field(0.0, description="probability that an image's colours are jittered; 0.8 is usual")
    brightness: float = Field(0.4, ge=0, description="largest relative change of brightness")
    contrast: float = Field(0.4, ge=0, description="largest relative change of contrast")
    saturation: float = Field(0.2, ge=0, description="largest relative change of saturation")
    hue: float = Field(0.1, ge=0, le=0.5, description="largest turn of the hue, as a share of the circle")
    grey: Share = Field(0.0, description="probability that an image loses its colour; 0.2 is usual")
    blur: Share = Field(0.0, description="probability that an image is blurred; 0.5 is usual")


class TrainConfig(Section):
    """The training run."""

    epochs: int = Field(30, ge=1, description="passes over the training images")
    batch_size: int = Field(256, ge=2, description="images per step over all workers, however many there are")
    micro_batch: int | None = Field(
        None, ge=1, description="most images per forward of a worker, gradients are accumulated; none: all at once"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW at train.lr_batch_size")
    lr_batch_size: int | None = Field(
        None, ge=1, description="batch size that train.lr is for, scaled linearly to train.batch_size; none: as it is"
    )
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_epochs: float = Field(1.5, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(
        0.05, ge=0, description="AdamW weight decay; none on norms, biases and what the network exempts"
    )
    clip_grad: float = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    ema_decay: float = Field(
        0.9998,
        ge=0,
        lt=1,
        description="decay of the averaged student that is evaluated and kept; (1 + steps) / (10 + steps) while that is less",
    )
    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = Field(
        0, description="training workers, or [least, most] as the cluster has them; 0: one per GPU, one without GPUs"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="arithmetic of the student; auto: bfloat16 or float16 where the device is fast in it"
    )
    compile: bool = Field(False, description="whether torch.compile compiles the student and the loss")
    shuffle_window: int = Field(1024, ge=1, description="images shuffled together after the shuffle of row groups")
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints within an epoch; 0: at epoch ends")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints that are kept")
    checkpoints: str | None = Field(
        None, description="folder or s3://, gs:// address of the checkpoints; none: in the run's folder below `work`"
    )
    best_metric: str | None = Field(
        None, description="evaluated metric (knn, ...) whose best checkpoint is kept as well; none: the latest alone"
    )
    best_is: Literal["highest", "lowest"] = Field("highest", description="which value of train.best_metric is best")

    @field_validator("workers")
    @classmethod
    def _least_before_most(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[least, most] must not be {list(value)}")
        return value

    @model_validator(mode="after")
    def _equal_shares(self) -> TrainConfig:
        check_shares(self.batch_size, self.most_workers or 1)
        return self

    @property
    def most_workers(self) -> int:
        """Most workers that are asked for; 0: as many as there are GPUs."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def peak_lr(self) -> float:
        """Peak learning rate at `batch_size`: scaled linearly from `lr_batch_size` (Goyal et al. 2017, section 2.1)."""
        return self.lr * self.batch_size / (self.lr_batch_size or self.batch_size)

    @property
    def lr_rule(self) -> str:
        """How `peak_lr` came about, in words."""
        peak = f"{self.peak_lr:.3g} at {self.batch_size} images a step"
        scaled = f", scaled linearly from {self.lr:.3g} at {self.lr_batch_size}"
        return peak + (scaled if self.lr_batch_size else ", as given")


def check_shares(batch_size: int, shares: int) -> None:
    """Refuse a global batch that is not shared equally.

    Raises:
        ValueError: naming the nearest batch sizes that are.
    """
    if batch_size % shares or batch_size < shares:
        below = batch_size // shares * shares
        near = " or ".join(str(size) for size in (below, below + shares) if size)
        raise ValueError(f"train.batch_size={batch_size} cannot be shared equally by {shares} workers; {near} can")


class KnnConfig(Section):
    """Weighted k-nearest-neighbour classification of the held-out images."""

    k: int = Field(20, ge=1, description="neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")
    bank: int = Field(50_000, ge=1, description="training images in the bank, at most; evenly spaced")
    batch_size: int = Field(256, ge=1, description="images per student forward")


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; none: MLFLOW_TRACKING_URI, else SQLite in the work folder")
    experiment: str = Field("regla-distill", description="MLflow experiment")


class EvaluateConfig(Section):
    """What `jobs/evaluate.py` evaluates."""

    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI (models:/m-...), or timm name (regla_m, timm/<name>)",
    )
    weights: str = Field(
        "pretrained", description="of a timm name: pretrained, random[:seed], or a checkpoint file; student.args apply"
    )
    input_size: int | None = Field(
        None,
        ge=16,
        description="side of the input in pixels; none: as the student was exported, else student.input_size",
    )
    ks: list[PositiveInt] = Field([10, 20, 100, 200], min_length=1, description="neighbours that vote in `knn`")
    lrs: list[PositiveFloat] = Field(
        [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        min_length=1,
        description="learning rates of the linear classifiers, all trained in one pass; the best on data.val is reported",
    )
    epochs: int = Field(30, ge=1, description="passes over the training features in `linear` and `seg-probe`")
    batch_size: int = Field(256, ge=1, description="images per step in `linear`; `seg-probe` takes 16 of them at most")
    grid: int | None = Field(
        None, ge=1, description="side of the grid of features in `seg-probe`; none: of the student's stride-16 map"
    )
    model: str | None = Field(None, description="fine-tuned model: MLflow model URI or the folder that finetune wrote")
    annotations: str | None = Field(None, description="COCO JSON that evaluate.results are held against")
    results: str | None = Field(None, description="detections in COCO's results format")


class FinetuneConfig(Section):
    """What `jobs/finetune.py` trains, and from what."""

    task: Literal["classify", "segment", "detect"] = Field("classify", description="classify, segment or detect")
    student: str | None = Field(
        None,
        description="exported student folder, MLflow model URI, or timm name (`timm/<name>.<tag>`: with the hub's weights); "
        "none: student.name from scratch",
    )
    frozen: bool = Field(False, description="whether the backbone stays as it is and the head alone learns")
    schedule: Literal["cosine", "poly", "multistep"] = Field(
        "cosine", description="learning rate after the warm-up: cosine, poly (power 0.9), or steps at the milestones"
    )
    milestones: list[PositiveInt] = Field(
        [8, 11], description="epochs after which multistep divides the learning rate by 10"
    )
    epoch_steps: int = Field(0, ge=0, description="optimiser steps that make an epoch; 0: one pass over the images")
    data_workers: int | None = Field(
        None, ge=0, description="processes that prepare images, per training worker; none: its CPUs less one"
    )
    pictures: int = Field(8, ge=0, description="held-out images that are drawn with their predictions")


class ClassifyConfig(Section):
    """Image classification; the side of the input is student.input_size."""

    augment: str | None = Field(
        "rand-m9-mstd0.5-inc1", description="timm's policy (RandAugment, AutoAugment, AugMix ...); none: colour jitter"
    )
    min_area: float = Field(0.08, gt=0, le=1, description="smallest share of the image's area in a training crop")
    mixup: float = Field(0.8, ge=0, description="alpha of Mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0: none")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    erase: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    crop_share: float = Field(0.95, gt=0, le=1, description="share of the resized image's side in the centre crop")
    teacher: str | None = Field(
        None,
        description="fine-tuned classifier of the same classes (folder, address or MLflow URI) whose probabilities go "
        "into the targets; none: labels alone",
    )
    teacher_share: float = Field(0.5, gt=0, le=1, description="share of the teacher's probabilities in the targets")


class SegmentConfig(Section):
    """Semantic segmentation; the side of a training crop, and of a sliding window, is student.input_size."""

    classes: str | None = Field(None, description="file of class names: one a line, or a table with a name column")
    reduce_zero_label: bool = Field(False, description="whether mask value 0 is ignored and classes count from 1")
    train_masks: str | None = Field(
        None, description="folder of the masks of data.train; none: its path with `images` as `annotations` or `masks`"
    )
    val_masks: str | None = Field(None, description="the same of data.val")
    size: int = Field(512, ge=16, description="short side in pixels that images are resized to, jitter apart")
    scales: list[PositiveFloat] = Field(
        [0.5, 2.0], min_length=2, max_length=2, description="smallest and largest factor of the scale jitter"
    )
    inference: Literal["whole", "slide"] = Field("whole", description="the whole image at once, or sliding windows")
    channels: int = Field(
        128, ge=32, multiple_of=32, description="channels of the Semantic FPN head; its pyramid has twice"
    )


class DetectConfig(Section):
    """Detection and instance segmentation."""

    train_annotations: str | None = Field(
        None, description="COCO JSON of data.train; none: ../annotations/instances_<folder>.json beside the folder"
    )
    val_annotations: str | None = Field(None, description="the same of data.val")
    sizes: list[PositiveInt] = Field(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        min_length=1,
        description="short sides in pixels that training images are resized to; the last one in evaluation",
    )
    max_size: int = Field(1333, ge=32, description="largest long side in pixels")
    masks: bool = Field(
        True, description="whether instance masks are learned (Mask R-CNN), or boxes alone (Faster R-CNN)"
    )
    anchor: int = Field(
        32, ge=1, description="side of the smallest anchor in pixels; it doubles at each of five levels"
    )
    channels: int = Field(
        256, ge=8, description="channels of the pyramid and the mask head; the box head has four times as many"
    )


class PlanConfig(Section):
    """What `jobs/precompute.py --plan` reckons with; decides nothing that is computed."""

    gpu_hour_price: float = Field(2.0, ge=0, description="price of a GPU hour, in any currency")
    images_per_second: float = Field(1000.0, gt=0, description="speed of a training that the cache is to keep up with")


class BenchmarkConfig(Section):
    """What `jobs/benchmark.py` measures."""

    models: list[str] = Field(
        [
            "regla_m",
            "iformer_m",
            "efficientvit_b1",
            "efficientvit_b2",
            "repvit_m1_1",
            "fastvit_sa12",
            "mobilenetv4_conv_medium",
            "mobilenetv4_hybrid_medium",
            "mobilevitv2_100",
        ],
        min_length=1,
        description="timm models; `name {argument: value}` passes arguments",
    )
    reference: str = Field("regla_m", description="model that ratios refer to")
    sizes: list[PositiveInt] = Field([512], min_length=1, description="sides of the input in pixels")
    batch_sizes: list[PositiveInt] = Field([1], min_length=1, description="images per forward")
    forms: list[Literal["eager", "fused", "compiled", "onnx"]] = Field(
        ["fused", "onnx"], min_length=1, description="eager, fused, compiled, onnx (ONNX Runtime)"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the models run")
    precisions: list[Literal["float32", "bfloat16", "float16"]] = Field(
        ["float32"], min_length=1, description="float32, bfloat16, float16"
    )
    threads: int = Field(1, ge=1, description="CPU threads of torch and of ONNX Runtime")
    rounds: int = Field(11, ge=1, description="interleaved visits of each model; the median is reported")


PHASE_FIELDS = ("data", "teachers", "views", "cache", "student.input_size", "loss", "augment", "train")
"""What a phase may change: all but what makes the network and the run what they are."""


class Config(Section):
    """The whole tree."""

    name: str = Field("distill", description="name of the run")
    work: str | None = Field(
        None, description="folder for cache, runs and MLflow; none: ./work, or ~/regla-distill in a submitted job"
    )
    outputs: str | None = Field(
        None,
        description="folder or s3://, gs:// address that the results of a finished run are copied to; none: they stay in `work` "
        "and in MLflow",
    )
    seed: int = Field(0, ge=0, description="seed of weights, order and generated scenes")
    data: DataConfig = DataConfig()
    teachers: list[TeacherConfig] = Field([TeacherConfig(model="hog")], min_length=1, description="list of teachers")
    views: ViewsConfig = ViewsConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    knn: KnnConfig = KnnConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    classify: ClassifyConfig = ClassifyConfig()
    segment: SegmentConfig = SegmentConfig()
    detect: DetectConfig = DetectConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    plan: PlanConfig = PlanConfig()
    phases: list[dict[str, Any]] = Field(
        [],
        description="stages of the training, each the fields that it changes: [{train.epochs: 25}, {student.input_size: 384}]",
    )

    @field_validator("teachers", mode="before")
    @classmethod
    def _strings_are_models(cls, value: Any) -> Any:
        return (
            [{"model": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @property
    def val(self) -> str | None:
        """Held-out images: `data.val`, or the generator's own where the training images are generated."""
        generated = self.data.train == "samples" and self.data.samples.val > 0
        return self.data.val or ("samples" if generated else None)

    def phase_configs(self) -> tuple[Config, ...]:
        """The configuration of every phase: the recipe with what the phase changes, and itself where there is none.

        Raises:
            UserError: for what a phase cannot change, or what would not do in a recipe either.
        """
        if not self.phases:
            return (self,)
        return tuple(self._phase(number, changes) for number, changes in enumerate(self.phases))

    def _phase(self, number: int, changes: dict[str, Any]) -> Config:
        tree = self.model_dump(exclude={"phases"})
        where = f"phases.{number}"
        for key, value in _leaves(changes):
            if not key.startswith(PHASE_FIELDS):
                raise UserError(
                    f"{where}: {key} cannot change between phases; a phase may change {', '.join(PHASE_FIELDS)}"
                )
            try:
                _assign(tree, key, value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: " + "; ".join(_explain(problem) for problem in error.errors())) from None

    def fingerprint(self, reads: Collection[str] = ()) -> str:
        """Digest of every field that decides what the run computes; a rerun of equal digest is the same run.

        Args:
            reads: sections beside the usual ones that this job goes by.
        """
        left_out = {"tracking", "evaluate", "benchmark", "plan", "work", "outputs"} - set(reads)
        fields = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_config(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML recipe and apply dotted overrides (`train.epochs=5`) in order.

    Raises:
        UserError: for a missing or malformed recipe, an unknown key, a wrong type or a value out of range.
    """
    tree = _read_recipe(Path(recipe)) if recipe else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is neither a recipe (.yaml) nor an override (key=value), see --help")
        _assign(tree, key, _parse(override, text))
        tree = _changed({}, tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None
    config.phase_configs()
    return config


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe, over that of the one beside it that it names as its `base`."""
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        named = f", the base of {above[-1]}," if above else ""
        raise UserError(f"recipe {path}{named} does not exist" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping of fields, such as `train: {{epochs: 5}}`")
    whole: dict[str, Any] = {}
    if "base" in tree:
        base = path.parent / str(tree.pop("base"))
        if base in (*above, path):
            raise UserError(f"recipe {path}: base: {base} is based on this recipe itself")
        whole = _read_recipe(base, (*above, path))
    return _changed(whole, tree)


def _changed(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A tree with the fields that another one gives, nested or dotted; in the tree, and in its phases, they are nested.

    A field then has one place, where an override finds it.
    """
    for key, value in _leaves(changes):
        _assign(whole, key, value)
    if isinstance(phases := whole.get("phases"), list):
        whole["phases"] = [_changed({}, phase) if isinstance(phase, dict) else phase for phase in phases]
    return whole


def _parse(override: str, text: str) -> Any:
    try:
        return _meant(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(
            f"override '{override}' is not valid YAML ({reason}); one with spaces or brackets is quoted for the shell"
        ) from None


def _meant(value: Any) -> Any:
    """YAML says null for what `--help` calls none."""
    return None if value == "none" else value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the fields that a tree gives, whether it nests its sections or has dotted keys itself."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        section = re.sub(r"\.\d+(?=\.|$)", ".0", key) + "."
        if isinstance(value, dict) and any(field.startswith(section) for field in _keys()):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, _meant(value)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for position, part in enumerate(path):
        node = _child(node, part, ".".join(path[: position + 1]))
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"{where}: the list has {len(node)} entries, numbered from 0")
        index = int(part)
        if isinstance(node[index], str):
            node[index] = {"model": node[index]}
        return node[index]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _explain(problem: Any) -> str:
    # pydantic also puts the types of a union into the path.
    location, kind = [part for part in problem["loc"] if not re.search(r"[\[-]", str(part))], problem["type"]
    where = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return f"unknown key {where}" + _suggest(location)
    if kind == "missing":
        return f"{where} must be given"
    given = "" if isinstance(problem["input"], dict | list) else f", not {problem['input']!r}"
    message = re.sub(r" or instance of \w+", "", problem["msg"].removeprefix("Value error, "))
    if where and message.startswith(f"{where}."):
        return message
    return f"{where}: {message[0].lower()}{message[1:]}{given}"


def _suggest(location: Sequence[Any]) -> str:
    """Near names at the same depth, or every field of the same name elsewhere."""
    parts = ["0" if isinstance(part, int) else str(part) for part in location]
    names = {".".join(key.split(".")[: len(parts)]) for key in _keys()}
    near = difflib.get_close_matches(".".join(parts), sorted(names), n=1)
    best = near or [key for key in _keys() if key.rsplit(".", 1)[-1] == parts[-1]]
    return f"; did you mean {' or '.join(best)}?" if best else "; --help lists every key"


@cache
def _keys() -> tuple[str, ...]:
    return tuple(name for name, *_ in iter_fields())


def iter_fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, meaning) of every field, in order; list entries are shown with index 0."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        item = next((arg for arg in typing.get_args(annotation) if _is_section(arg)), None)
        if _is_section(annotation):
            yield from iter_fields(typing.cast(type[BaseModel], annotation), f"{prefix}{name}.")
        elif item is not None:
            yield from iter_fields(item, f"{prefix}{name}.0.")
        else:
            default = "required" if info.is_required() else _shown(info.default)
            yield prefix + name, _type_name(annotation), default, info.description or ""


def _shown(default: Any) -> Any:
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) else default


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return "|".join("none" if arg is type(None) else _type_name(arg) for arg in typing.get_args(annotation))
    if typing.get_origin(annotation) in (list, tuple, dict):
        return {list: "list", tuple: "list", dict: "mapping"}[typing.get_origin(annotation)]
    return getattr(annotation, "__name__", str(annotation))


def describe_fields() -> str:
    """The text of `--help`: one line per field with its type, default and meaning."""
    rows = [
        (key, f"{kind} = {'none' if default is None else default}", text) for key, kind, default, text in iter_fields()
    ]
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:<{width}}  {text}  [{value}]" for key, value, text in rows)
