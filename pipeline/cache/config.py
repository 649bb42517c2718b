"""What is cached, and how: teachers, views, the cache itself, and its plan."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
)

from pipeline.config.tree import Schedule, Section


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


class PlanConfig(Section):
    """What `jobs/precompute.py --plan` reckons with; decides nothing that is computed."""

    gpu_hour_price: float = Field(2.0, ge=0, description="price of a GPU hour, in any currency")
    images_per_second: float = Field(1000.0, gt=0, description="speed of a training that the cache is to keep up with")
