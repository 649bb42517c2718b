"""The rows of a view: keys and geometry, in the order that every teacher's shard keeps.

The rows of the view ``full`` are columns of the `images` shards. Crops have row shards of their own, which refer to images
by their key: an image's bytes are stored once, however many views it has. Row group n of the crops belongs to row group n
of `images`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.cache.layout.part import KEY, Part
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.errors import UserError
from pipeline.imaging.geometry import View, ViewPolicy
from pipeline.imaging.photometric import Photometric

BOX = ("left", "top", "right", "bottom")
"""Columns of a view's box."""
ROWS_SCHEMA = pa.schema(
    [
        pa.field("key", KEY, nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        *(pa.field(side, pa.float32(), nullable=False) for side in BOX),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
"""Key of the image and number of the view, the view's box as fractions of the image, and whether the view is mirrored."""
PHOTOMETRIC_SCHEMA = pa.schema([pa.field(name, pa.float32(), nullable=False) for name in Photometric._fields])
"""What a row of crops has besides if their colours are changed: the fields of `Photometric`."""
IMAGES_SCHEMA = pa.schema([*ROWS_SCHEMA, pa.field("image", pa.binary(), nullable=False)])
"""The rows of the view ``full``, and the encoded image."""
MIXUP_SCHEMA = pa.schema([pa.field("partner", KEY), pa.field("mix", pa.float32(), nullable=False)])
"""What a row of crops has besides if some are mixed: key of the partner, null for none, and the share of the image itself."""


class ViewRows(NamedTuple):
    """A shard's images (`IMAGES_SCHEMA`), and the views of them that teachers encode (`rows_schema`), image by image.

    `files` names the shard file that crops were read from, as ``rows``. `source` holds all images of the shard and their rows, if
    these are some of them: partners may be others.
    """

    images: pa.Table
    rows: pa.Table
    files: dict[str, str]
    source: tuple[pa.Table, pa.Table] | None = None

    def slice(self, first: int, count: int) -> ViewRows:
        """`count` images from number `first` on, with their views."""
        views = self.rows.num_rows // max(1, self.images.num_rows)
        images, rows = self.images.slice(first, count), self.rows.slice(first * views, count * views)
        return ViewRows(images, rows, self.files, self.source or (self.images, self.rows))

    def partners(self) -> list[tuple[pa.Scalar, View, float] | None]:
        """What every row is mixed with: the partner's encoded image and view, and the share of the row's own view."""
        if "partner" not in self.rows.column_names:
            return [None] * self.rows.num_rows
        images, rows = self.source or (self.images, self.rows)
        places = {key: place for place, key in enumerate(images["key"].to_pylist())}
        views, count = views_of(rows), rows.num_rows // max(1, images.num_rows)
        columns = (self.rows[name].to_pylist() for name in ("partner", "view", "mix"))
        return [
            None if key is None else (images["image"][places[key]], views[places[key] * count + number], share)
            for key, number, share in zip(*columns, strict=True)
        ]

    def of_images(self, chosen: np.ndarray) -> ViewRows:
        """The images that are chosen ([N] bool), with their views."""
        views = np.repeat(chosen, self.rows.num_rows // max(1, self.images.num_rows))
        images, rows = self.images.filter(pa.array(chosen)), self.rows.filter(pa.array(views))
        return ViewRows(images, rows, self.files, self.source or (self.images, self.rows))


def rows_schema(policy: ViewPolicy) -> pa.Schema:
    """Columns of the rows of a view."""
    photometric = PHOTOMETRIC_SCHEMA if policy.photometric else ()
    return pa.schema([*ROWS_SCHEMA, *photometric, *(MIXUP_SCHEMA if policy.mixup else ())])


def geometry_columns(policy: ViewPolicy) -> list[str]:
    """Names of the columns that say how a view is made of its image, as `view_of` takes their values."""
    return [*BOX, "flip", *(PHOTOMETRIC_SCHEMA.names if policy.photometric else ())]


def view_row(key: bytes, number: int, view: View) -> dict[str, object]:
    """One row of :func:`rows_schema`."""
    changes = view.photometric._asdict() if view.photometric else {}
    return {"key": key, "view": number, **dict(zip(BOX, view.box, strict=True)), "flip": view.flip, **changes}


def view_of(left: float, top: float, right: float, bottom: float, flip: float, *changes: float) -> View:
    """A view from the values of its row, in the order of `geometry_columns`."""
    return View((left, top, right, bottom), bool(flip), Photometric(*changes) if changes else None)


def views_of(rows: pa.Table) -> list[View]:
    """The stored view of every row."""
    names = [*BOX, "flip", *(name for name in PHOTOMETRIC_SCHEMA.names if name in rows.column_names)]
    return [view_of(*values) for values in zip(*(rows[name].to_pylist() for name in names), strict=True)]


def read_view_rows(part: Part, shard: int) -> ViewRows:
    """Images and rows of a shard, read now; UserError if either is missing, or the rows are not views of these images."""
    record = complete_record(part.images, shard)
    images = part.images.read(record)
    if not part.policy.crops:
        return ViewRows(images, images.select(ROWS_SCHEMA.names), {})
    drawn = complete_record(part.rows, shard)
    rows = part.rows.read(drawn)
    check_rows(part, shard, rows, images)
    return ViewRows(images, rows, {"rows": drawn.file})


def complete_record(folder: ShardFolder, shard: int) -> ShardRecord:
    """The record of a complete shard, read now; UserError if there is none."""
    record = folder.record(shard)
    if record is None:
        raise UserError(f"{folder.store.uri} lacks shard {shard}: run the job again")
    return record


def check_rows(part: Part, shard: int, rows: pa.Table, images: pa.Table) -> None:
    """Check that `rows` are the views of `images`, image by image, mixed with these; UserError if they are not."""
    keys = images["key"].to_pylist()
    expected = [key for key in keys for _ in range(part.policy.rows_per_image)]
    partners = {*rows["partner"].to_pylist()} - {None} if part.policy.mixup else set()
    if rows["key"].to_pylist() != expected or not partners <= {*keys}:
        raise UserError(
            f"shard {shard} of {part.rows.store.uri} does not hold the views of its images; delete "
            f"{part.view.uri} and run the job again"
        )
