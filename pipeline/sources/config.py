"""Configuration of the image sources."""

from pydantic import Field

from pipeline.config.tree import Section, operational


class SamplesConfig(Section):
    """The generated sample scenes, used when `data.train` is `samples`."""

    train: int = Field(1000, ge=1, description="number of generated training scenes")
    val: int = Field(300, ge=0, description="number of generated held-out scenes")
    size: int = Field(96, ge=32, description="side of a generated scene in pixels")


class DataConfig(Section):
    """Where images come from."""

    train: str = Field(
        "samples",
        description="images to distil on: class folder or pattern of them, tar shards or Parquet, by path or URI (s3://, gs://, "
        "az://, hf://, https://), a version of a data set in the cache (cache://<data set>/<version>), or `samples` (generated)",
    )
    val: str | None = Field(None, description="held-out images for kNN, in the same forms; none: no kNN")
    name: str | None = operational(None, description="readable name of the data in the cache; none: from the path")
    image_column: str | None = Field(None, description="Parquet column that holds the images; none: found by type")
    label_column: str | None = Field(
        None, description="Parquet column that holds the labels; none: label, fine_label, labels"
    )
    max_bad: float = operational(
        0.05, ge=0, le=1, description="maximum share of unreadable images; above it the job stops"
    )
    samples: SamplesConfig = SamplesConfig()

    @property
    def held_out(self) -> str | None:
        """Held-out images: `val`, or the generator's own where the training images are generated."""
        generated = self.train == "samples" and self.samples.val > 0
        return self.val or ("samples" if generated else None)
