"""The rows of a view: its keys, in the order that every teacher's shard keeps, and the geometry of each.

Of the view ``full`` they are columns of the `images` shards. Crops have row shards of their own, which refer to the
images by their id: an image's bytes are stored once, however many views it has. A row group of crops belongs to the row
group of the same number of `images`.

What is made of images tells their file in its record, and the file's name their content. Before images are listed that
are others than there were, what was made of those is taken out of the list: it never stands beside pixels not its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.cache.layout.dataset import Dataset, discard_stats
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.errors import UserError
from pipeline.imaging.decode import image_size
from pipeline.imaging.geometry import View
from pipeline.storage.store import Store

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


log = logging.getLogger(__name__)


class ViewRows(NamedTuple):
    """What a teacher is asked about a shard.

    Attributes:
        images: the shard of `images`.
        rows: views of them, in the order of the teacher's rows.
        files: that both came from: of ``images``, and of crops of ``rows``.
    """

    images: pa.Table
    rows: pa.Table
    files: dict[str, str]


def row(sample_id: str, number: int, view: View) -> dict[str, object]:
    """One row of `ROWS_SCHEMA`."""
    left, top, right, bottom = view.box
    box = {"left": left, "top": top, "right": right, "bottom": bottom}
    return {"sample_id": sample_id, "view": number, **box, "flip": view.flip}


def views_of(rows: pa.Table) -> list[View]:
    """The stored view of every row."""
    columns = [rows[name].to_pylist() for name in ("left", "top", "right", "bottom", "flip")]
    return [View((left, top, right, bottom), flip) for left, top, right, bottom, flip in zip(*columns, strict=True)]


def read_view_rows(dataset: Dataset, shard: int) -> ViewRows:
    """Images and rows of a shard; crops are drawn and committed where they are not there yet.

    Raises:
        UserError: where the images are not there, or the crops are not theirs.
    """
    record = dataset.images.record(shard)
    if record is None:
        raise UserError(f"{dataset.images.store.uri} lacks shard {shard}: run the job again")
    images, files = dataset.images.read(record), {"images": record.file}
    if not dataset.policy.crops:
        return ViewRows(images, images.select(ROWS_SCHEMA.names), files)
    drawn = dataset.rows.record(shard) or _commit_rows(dataset, shard, images, files)
    rows = dataset.rows.read(drawn)
    check_rows(dataset, shard, rows, images)
    return ViewRows(images, rows, {**files, "rows": drawn.file})


def _commit_rows(dataset: Dataset, shard: int, images: pa.Table, files: dict[str, str]) -> ShardRecord:
    teachers = [ShardFolder(folder) for folder in _teachers(dataset.view)]
    take_out = partial(_take_out_foreign, "rows", teachers)
    return dataset.rows.commit(shard, _draw(dataset, images), facts=files, before_listing=take_out)


def commit_images(dataset: Dataset, shard: int, images: pa.Table, facts: dict[str, Any]) -> None:
    """Commit a shard of images."""
    views = [dataset.store.sub("views").sub(name) for name in dataset.store.sub("views").folders()]
    folders = [ShardFolder(folder) for view in views for folder in (view.sub("rows"), *_teachers(view))]
    take_out = partial(_take_out_foreign, "images", folders)
    dataset.images.commit(shard, images, facts=facts, before_listing=take_out)


def _teachers(view: Store) -> Iterator[Store]:
    teachers = view.sub("teachers")
    return (teachers.sub(name) for name in teachers.folders())


def _take_out_foreign(part: str, folders: Iterable[ShardFolder], record: ShardRecord) -> None:
    """Un-list what was made of another file of ``images`` or ``rows`` than this record's."""
    for folder in folders:
        made = folder.listing(record.shard)
        if made is not None and made.facts.get(part) != record.file:
            log.warning(
                "%s: shard %d was made of other %s than there are now (changed images, or another version of pyarrow): it "
                "will be computed again",
                folder.store.uri,
                record.shard,
                part,
            )
            folder.unlist(record.shard)
            discard_stats(folder)


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
