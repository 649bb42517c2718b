"""The rows of a view: keys and geometry, in the order that every teacher's shard keeps.

The rows of the view ``full`` are columns of the `images` shards. Crops have row shards of their own, which refer to images
by their id: an image's bytes are stored once, however many views it has. Row group n of the crops belongs to row group n
of `images`.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.errors import UserError
from pipeline.imaging.geometry import View

BOX = ("left", "top", "right", "bottom")
"""Columns of a view's box."""
ROWS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        *(pa.field(side, pa.float32(), nullable=False) for side in BOX),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
"""Key (sample_id, view), the view's box as fractions of the image, and whether the view is mirrored."""
IMAGES_SCHEMA = pa.schema([*ROWS_SCHEMA, pa.field("label", pa.int64()), pa.field("image", pa.binary(), nullable=False)])
"""The rows of the view ``full``, the label, and the encoded image."""


class ViewRows(NamedTuple):
    """A shard's images (`IMAGES_SCHEMA`), and the views of them that teachers encode (`ROWS_SCHEMA`), image by image.

    `files` names the shard files that both were read from, by ``images`` and, for crops, ``rows``.
    """

    images: pa.Table
    rows: pa.Table
    files: dict[str, str]

    def slice(self, first: int, count: int) -> ViewRows:
        """`count` images from number `first` on, with their views."""
        views = self.rows.num_rows // max(1, self.images.num_rows)
        return ViewRows(self.images.slice(first, count), self.rows.slice(first * views, count * views), self.files)


def view_row(sample_id: str, number: int, view: View) -> dict[str, object]:
    """One row of `ROWS_SCHEMA`."""
    return {"sample_id": sample_id, "view": number, **dict(zip(BOX, view.box, strict=True)), "flip": view.flip}


def views_of(rows: pa.Table) -> list[View]:
    """The stored view of every row."""
    columns = [rows[name].to_pylist() for name in (*BOX, "flip")]
    return [View((left, top, right, bottom), flip) for left, top, right, bottom, flip in zip(*columns, strict=True)]


def read_view_rows(dataset: Dataset, shard: int) -> ViewRows:
    """Images and rows of a shard, read now; UserError if either is missing, or the rows are not views of these images."""
    record = complete_record(dataset.images, shard)
    images, files = dataset.images.read(record), {"images": record.file}
    if not dataset.policy.crops:
        return ViewRows(images, images.select(ROWS_SCHEMA.names), files)
    drawn = complete_record(dataset.rows, shard)
    rows = dataset.rows.read(drawn)
    check_rows(dataset, shard, rows, images)
    return ViewRows(images, rows, {**files, "rows": drawn.file})


def complete_record(folder: ShardFolder, shard: int) -> ShardRecord:
    """The record of a complete shard, read now; UserError if there is none."""
    record = folder.record(shard)
    if record is None:
        raise UserError(f"{folder.store.uri} lacks shard {shard}: run the job again")
    return record


def check_rows(dataset: Dataset, shard: int, rows: pa.Table, images: pa.Table) -> None:
    """Check that `rows` are the views of `images`, image by image; UserError if they are not."""
    expected = [name for name in images["sample_id"].to_pylist() for _ in range(dataset.policy.rows_per_image)]
    if rows["sample_id"].to_pylist() != expected:
        raise UserError(
            f"shard {shard} of {dataset.rows.store.uri} does not hold the views of its images; delete "
            f"{dataset.view.uri} and run the job again"
        )
