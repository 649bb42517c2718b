"""What is cached, and how: teachers, views, the cache itself, and its plan."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.dotted import assign, is_field, keys_of, leaves, validate
from pipeline.config.tree import Schedule, Section, Share, operational
from pipeline.errors import UserError
from pipeline.runs.config import ImageJobConfig

Decoder = Literal["cpu", "nvjpeg"]
"""What decodes images: see pipeline/imaging/gpu_decode.py."""

PHASE_FIELDS = ("data", "teachers", "views", "cache", "student.input_size", "resolutions", "loss", "augment", "train")
"""Sections and fields that a phase may change. The others make the network and the run what they are."""


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
    pool: int | None = Field(
        None, ge=1, description="side of the square of patches that is averaged into one; none: the teacher's default"
    )
    args: dict[str, Any] = Field({}, description="arguments passed to the library's model constructor")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the images that it is asked about, chosen by their content; its loss is the mean over these",
    )
    codec: str | None = Field(None, description="codec of its features; none: cache.codec")
    basis: str | None = Field(
        None,
        min_length=1,
        description="any name: its projection is fitted on the images of the day, and its features are stored beside those of "
        "other names; none: the first projection. Only with a codec that projects (pca)",
    )
    weight: Schedule = Field(
        1.0,
        description="weight in the loss, or a schedule by share of training done, linear in between: {0: 1, 0.5: 0.2}",
    )
    summary_weight: Schedule = Field(1.0, description="weight of its summary loss, in the same forms")
    patch_weight: Schedule = Field(1.0, description="weight of its patch loss, in the same forms")
    mask_weight: Schedule = Field(
        0.0,
        description="of a SAM: weight of the loss of masks that its decoder makes of the student's embedding, in the same "
        "forms; 0: none are made",
    )


class PhotometricConfig(Section):
    """Photometric changes of images."""

    jitter: Share = Field(0.0, description="probability of colour jitter per image; 0.8 is usual")
    brightness: float = Field(0.4, ge=0, description="largest relative change of brightness")
    contrast: float = Field(0.4, ge=0, description="largest relative change of contrast")
    saturation: float = Field(0.2, ge=0, description="largest relative change of saturation")
    hue: float = Field(0.1, ge=0, le=0.5, description="largest rotation of the hue, as a share of the circle")
    grey: Share = Field(0.0, description="probability that an image loses its colour; 0.2 is usual")
    blur: Share = Field(0.0, description="probability that an image is blurred; 0.5 is usual")


class ViewsConfig(Section):
    """Which views of the training images are cached; held-out images are always whole."""

    crops: int = Field(0, ge=0, description="random resized crops per image, cached; 0: the whole image once")
    min_area: float = Field(0.35, gt=0, le=1, description="smallest share of the image's area in a crop")
    max_ratio: float = Field(4 / 3, ge=1, description="largest ratio of a crop's sides")
    flip: float = Field(0.5, ge=0, le=1, description="probability that a crop is flipped")
    per_step: int = Field(1, ge=1, description="crops of an image per step; the image is decoded once for all of them")
    photometric: PhotometricConfig = PhotometricConfig()
    mixup: Share = Field(
        0.0, description="probability that a crop, but for an image's first, is mixed with one of another image"
    )


class ResolutionConfig(Section):
    """A further input size, at which a share of the samples of each step is trained."""

    input_size: int = Field(ge=16, description="side of the student's input in pixels")
    share: float = Field(gt=0, lt=1, description="share of the samples of a step; the rest keeps student.input_size")
    teachers: dict[int, int] = Field(
        {},
        description="input sizes of teachers there, by number: {0: 336}; each has its own cache. The others keep theirs",
    )


class CacheConfig(Section):
    """The feature cache and how it is filled."""

    uri: str | None = operational(None, description="folder of the cache; none: <work>/cache")
    shard_size: int = Field(512, ge=1, description="images per shard: the unit of extraction, commit and resume")
    codec: str = Field(
        "pca-int8-zstd", description="codec of the features: [pca[<k>]-]<number format>[-zstd]; see docs/cache.md"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="numeric precision of the teachers")
    decoder: Decoder = Field(
        "cpu",
        description="what decodes the teachers' images: cpu, or nvjpeg (JPEGs on the GPU; other pixels, so other features)",
    )
    batch_size: int = Field(32, ge=1, description="images per forward pass of a teacher")


class PlanConfig(Section):
    """Settings of `jobs/precompute.py --plan`; they affect no computed result."""

    gpu_hour_price: float = Field(2.0, ge=0, description="price of a GPU hour, in any currency")
    images_per_second: float = Field(
        1000.0, gt=0, description="training speed in images per second that the cache has to sustain"
    )


class CacheJobConfig(ImageJobConfig):
    """A job that keeps images, and features of them, in the cache."""

    cache: CacheConfig = CacheConfig()

    def shared_folders(self) -> dict[str, str]:
        """The cache, if it is not in the work folder."""
        return {"cache.uri": self.cache.uri} if self.cache.uri else {}


class PrecomputeJobConfig(CacheJobConfig):
    """`jobs/precompute.py`: the features of teachers on views of images."""

    teachers: list[TeacherConfig] = Field([TeacherConfig(model="hog")], min_length=1, description="list of teachers")
    views: ViewsConfig = ViewsConfig()
    plan: PlanConfig = operational(PlanConfig())
    phases: list[dict[str, Any]] = Field(
        [],
        description="stages of the training, each the fields that it changes: [{train.epochs: 25}, {student.input_size: 384}]",
    )
    resolutions: list[ResolutionConfig] = Field(
        [], description="further input sizes in each step: [{input_size: 384, share: 0.25}]"
    )

    @model_validator(mode="after")
    def _resolutions_fit(self) -> Self:
        for number, resolution in enumerate(self.resolutions):
            for teacher in resolution.teachers:
                if not 0 <= teacher < len(self.teachers):
                    raise ValueError(
                        f"resolutions.{number}.teachers: there is no teacher {teacher}, only 0 to {len(self.teachers) - 1}"
                    )
        if (total := sum(resolution.share for resolution in self.resolutions)) >= 1:
            raise ValueError(f"resolutions: the shares add up to {total:g}, which leaves nothing to student.input_size")
        sizes = [resolution.input_size for resolution in self.resolutions]
        if len(sizes) > len(set(sizes)):
            raise ValueError(f"resolutions: two of them have the same input_size ({', '.join(map(str, sizes))})")
        return self

    @field_validator("teachers", mode="before")
    @classmethod
    def _strings_are_models(cls, value: Any) -> Any:
        teachers = value if isinstance(value, list) else []
        return [{"model": item} if isinstance(item, str) else item for item in teachers] or value

    def subject(self) -> list[str]:
        """The teachers."""
        return ["+".join(teacher.model.removeprefix("timm/") for teacher in self.teachers)]

    def details(self) -> list[str]:
        """The images, and a table of the teachers."""
        rows = [f"\n| {teacher.model} | {teacher.weights} | {teacher.weight} |" for teacher in self.teachers]
        return [
            *super().details(),
            "".join(["| teacher | weights | in the loss |\n|---|---|---|", *rows]),
            "The nested run `precompute` has their licences and the hashes of their features as artifacts: `teachers/`, "
            "`manifests/`.",
        ]

    def inputs(self) -> dict[str, str]:
        """The images, and files of weights."""
        files = {f"teachers.{n}.weights": Path(teacher.weights).expanduser() for n, teacher in enumerate(self.teachers)}
        return super().inputs() | {field: str(file.resolve()) for field, file in files.items() if file.is_file()}

    def at_resolution(self, resolution: ResolutionConfig) -> Self:
        """The configuration at a further input size."""
        teachers = [
            teacher.model_copy(update={"input_size": resolution.teachers.get(number, teacher.input_size)})
            for number, teacher in enumerate(self.teachers)
        ]
        return self.model_copy(update={"teachers": teachers, "resolutions": []})

    def cache_configs(self) -> tuple[Self, ...]:
        """The configuration of each cache that the phases need, and that of the phase itself first."""
        return tuple(
            part
            for phase in self.phase_configs()
            for part in (phase, *(phase.at_resolution(found) for found in phase.resolutions if found.teachers))
        )

    def phase_configs(self) -> tuple[Self, ...]:
        """The configuration of each phase: the recipe with the changes of the phase. Without phases, the recipe itself.

        Raises:
            UserError: for a field that a phase cannot change, and for a value that no recipe may have.
        """
        phases = enumerate(self.phases)
        return tuple(self._phase(f"phases.{number}", changes) for number, changes in phases) or (self,)

    def _phase(self, where: str, changes: dict[str, Any]) -> Self:
        tree, keys = self.model_dump(exclude={"phases"}), keys_of(type(self))
        for key, value in leaves(changes, keys):
            if not key.startswith(PHASE_FIELDS):
                raise UserError(
                    f"{where}: {key} cannot change between phases; a phase may change {', '.join(PHASE_FIELDS)}"
                )
            if is_field(key, keys):  # others are of other jobs: `load_config` refuses what no job has
                try:
                    assign(tree, key, value)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
        return validate(type(self), tree, where)
