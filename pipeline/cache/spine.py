"""The rows of a view: its keys, in the order that every teacher's shard keeps, and the geometry of each.

Of the view ``full`` they are columns of the `images` shards. Crops have row shards of their own, which refer to the
images by their id: an image's bytes are stored once, however many views it has. A row group of crops belongs to the row
group of the same number of `images`.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.cache.dataset import Dataset
from pipeline.errors import UserError
from pipeline.views import View, image_size

ROWS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        pa.field("left", pa.float32(), nullable=False),
        pa.field("top", pa.float32(), nullable=False),
        pa.field("right", pa.float32(), nullable=False),
        pa.field("bottom", pa.float32(), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
"""Key (sample_id, view), the view's box as fractions of the image, its mirroring."""


def row(sample_id: str, number: int, view: View) -> dict[str, object]:
    """One row of `ROWS_SCHEMA`."""
    left, top, right, bottom = view.box
    box = {"left": left, "top": top, "right": right, "bottom": bottom}
    return {"sample_id": sample_id, "view": number, **box, "flip": view.flip}


def views_of(rows: pa.Table) -> list[View]:
    """The stored view of every row."""
    columns = [rows[name].to_pylist() for name in ("left", "top", "right", "bottom", "flip")]
    return [View((left, top, right, bottom), flip) for left, top, right, bottom, flip in zip(*columns, strict=True)]


def rows_of_shard(dataset: Dataset, shard: int, images: pa.Table) -> pa.Table:
    """The view's rows of a shard; crops are drawn and committed where they are not there yet."""
    if not dataset.policy.crops:
        return images.select(ROWS_SCHEMA.names)
    record = dataset.rows.record(shard)
    if record is None:
        dataset.rows.commit(shard, _draw(dataset, images))
        record = dataset.rows.record(shard)
        assert record is not None
    rows = dataset.rows.read(record)
    check_rows(dataset, shard, rows, images)
    return rows


def check_rows(dataset: Dataset, shard: int, rows: pa.Table, images: pa.Table) -> None:
    """Raise `UserError` unless every image has its views in `rows`, one after the other."""
    wanted = [name for name in images["sample_id"].to_pylist() for _ in range(dataset.policy.rows_per_image)]
    if rows["sample_id"].to_pylist() != wanted:
        raise UserError(
            f"shard {shard} of {dataset.rows.store.uri} does not hold the views of its images; delete "
            f"{dataset.view.uri} and run the job again"
        )


def _draw(dataset: Dataset, images: pa.Table) -> pa.Table:
    rows = []
    for sample_id, data in zip(images["sample_id"].to_pylist(), images["image"], strict=True):
        views = dataset.policy.views(sample_id, *image_size(data.as_py()))
        rows += [row(sample_id, number, view) for number, view in enumerate(views)]
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)
