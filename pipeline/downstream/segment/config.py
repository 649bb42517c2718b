"""The section of semantic segmentation."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, StrictInt

from pipeline.config.tree import Section


class SegmentConfig(Section):
    """Semantic segmentation; the side of a training crop, and of a sliding window, is student.input_size."""

    classes: str | None = Field(None, description="file of class names: one per line, or a table with a name column")
    reduce_zero_label: bool = Field(False, description="whether mask value 0 is ignored, so that classes count from 1")
    ignore: list[Annotated[StrictInt, Field(ge=0, lt=2**16)] | str] = Field(
        [], description="further mask values, or names of classes, that are ignored (255 always is)"
    )
    train_masks: str | None = Field(
        None,
        description="folder of the masks of data.train; none: its path with `images` replaced by `annotations` or `masks`",
    )
    val_masks: str | None = Field(None, description="the same for data.val")
    size: int = Field(512, ge=16, description="short side in pixels that images are resized to, before jitter")
    scales: list[PositiveFloat] = Field(
        [0.5, 2.0], min_length=2, max_length=2, description="smallest and largest factor of the scale jitter"
    )
    inference: Literal["whole", "slide"] = Field("whole", description="evaluate the whole image, or sliding windows")
    channels: int = Field(
        128,
        ge=32,
        multiple_of=32,
        description="channels of the Semantic FPN head; its pyramid has twice as many",
    )
