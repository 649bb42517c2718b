"""The section of detection and instance segmentation."""

from pydantic import Field, PositiveInt

from pipeline.config.tree import Section


class DetectConfig(Section):
    """Detection and instance segmentation."""

    train_annotations: str | None = Field(
        None, description="COCO JSON of data.train; none: ../annotations/instances_<folder>.json relative to the folder"
    )
    val_annotations: str | None = Field(None, description="the same for data.val")
    sizes: list[PositiveInt] = Field(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        min_length=1,
        description="short sides in pixels that training images are resized to, at random; evaluation uses the last",
    )
    max_size: int = Field(1333, ge=32, description="maximum long side in pixels")
    masks: bool = Field(True, description="whether to train instance masks (Mask R-CNN) or only boxes (Faster R-CNN)")
    anchor: int = Field(
        32, ge=1, description="side of the smallest anchor in pixels; it doubles at each of five levels"
    )
    channels: int = Field(
        256, ge=8, description="channels of the pyramid and the mask head; the box head has four times as many"
    )
