"""Configuration of the image sources."""

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.tree import Section, operational

_DECIMAL = re.compile(r"\d*\.\d+(e-\d+)?")


class SamplesConfig(Section):
    """The generated sample scenes, used when `data.train` is `samples`."""

    train: int = Field(1000, ge=1, description="number of generated training scenes")
    val: int = Field(300, ge=0, description="number of generated held-out scenes")
    size: int = Field(96, ge=32, description="side of a generated scene in pixels")


def scenes_of_any_seed(count: int | str, size: int | str) -> str:
    """The name of that many generated scenes of this size, whichever seed made them: accuracies on them are compared."""
    return f"samples-n{count}-s{size}"


class DataConfig(Section):
    """Where images come from."""

    train: str = Field(
        "samples",
        description="images to distil on: class folder or pattern of them, tar shards or Parquet, by path or URI (s3://, gs://, "
        "az://, hf://, https://), a version of a data set in the cache (cache://<data set>/<version>), or `samples` (generated)",
    )
    val: str | None = Field(
        None,
        description="held-out images for kNN, in the same forms, or the share of data.train to hold out, such as 0.1, chosen by "
        "name; none: no kNN",
    )
    name: str | None = operational(None, description="readable name of the data in the cache; none: from the path")
    image_column: str | None = Field(None, description="Parquet column that holds the images; none: found by type")
    label_column: str | None = Field(
        None, description="Parquet column that holds the labels; none: label, fine_label, labels"
    )
    max_bad: float = operational(
        0.05, ge=0, le=1, description="maximum share of unreadable images; above it the job stops"
    )
    samples: SamplesConfig = SamplesConfig()

    @field_validator("val", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        return str(value) if type(value) is float else value

    @field_validator("val")
    @classmethod
    def _check_share(cls, value: str | None) -> str | None:
        if value and _DECIMAL.fullmatch(value) and not 0 < float(value) < 1:
            raise ValueError(
                f"a share of data.train lies between 0 and 1, such as 0.1; a folder of this name is ./{value}"
            )
        return value

    @model_validator(mode="after")
    def _check_divisible(self) -> Self:
        if self.share and self.train == "samples":
            raise ValueError("generated scenes have held-out ones of their own; leave data.val out")
        if self.share and self.train.startswith("cache://"):
            raise ValueError(f"data.val={self.val}: {self.train} is not divided; name its images as data.train")
        return self

    @property
    def share(self) -> float | None:
        """The share of `train` that is held out; None if the held-out images have a location of their own, or there are none."""
        return float(self.val) if self.val and _DECIMAL.fullmatch(self.val) else None

    @property
    def held_out(self) -> str | None:
        """Where held-out images are: `val`; `train` for a share of it; the generator's own for generated training images."""
        if self.share:
            return self.train
        generated = self.train == "samples" and self.samples.val > 0
        return self.val or ("samples" if generated else None)
