"""Source -> `images` shards, and the row shards of crops: the keys and pixels that every teacher's shards align with.

An image that cannot be decoded is left out (quarantined), with the reason in the shard's record. The record of a derived
shard (crops, features) names the files that it was derived from, and a file's name contains the hash of its content. Before
a shard with other content than before is listed, whatever was derived from the old content is unlisted.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import simplejpeg

from pipeline.cache.layout.dataset import Dataset, discard_stats
from pipeline.cache.layout.shards import ShardFolder, ShardRecord
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA, ROWS_SCHEMA, complete_record, view_row
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image, decode_upright_jpeg, image_size
from pipeline.imaging.geometry import FULL
from pipeline.runtime import logs
from pipeline.sources.base import Source
from pipeline.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingest:
    """Commits a shard of `images` and, for a view of crops, its row shard, unless they exist. A Ray Data row is a shard.

    Attributes:
        splits: dataset and source by split (``train``, ``val``).
        known: ids that were quarantined before, by split and shard; a shard that would now lose more images is refused.
    """

    splits: Mapping[str, tuple[Dataset, Source]]
    known: Mapping[tuple[str, int], Set[str]] = field(default_factory=dict)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ingest `row["shard"]` of `row["split"]`; returns the row with ``error``, a user-fixable failure in one line."""
        dataset, source = self.splits[row["split"]]
        shard = int(row["shard"])
        try:
            with logs.shard_context(row, "index"):
                if dataset.images.record(shard) is None:
                    _commit_images(dataset, source, shard, self.known.get((row["split"], shard)))
                if dataset.policy.crops and dataset.rows.record(shard) is None:
                    commit_crops(dataset, shard)
        except UserError as error:
            return {**row, "error": str(error)}
        return {**row, "error": ""}


def _commit_images(dataset: Dataset, source: Source, shard: int, known: Set[str] | None) -> None:
    started = time.perf_counter()
    index = dataset.shard_index(shard)
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    keys = zip(index["sample_id"].to_pylist(), index["label"].to_pylist(), strict=True)
    for (sample_id, label), data in zip(keys, source.read(index), strict=True):
        reason = _unreadable(data)
        if reason:
            bad.append({"sample_id": sample_id, "reason": reason})
        else:
            rows.append({**view_row(sample_id, 0, FULL), "label": label, "image": data})
    lost = [] if known is None else [sample for sample in bad if sample["sample_id"] not in known]
    if lost:
        raise UserError(
            f"shard {shard} of {dataset.images.store.uri} is broken, and {dataset.location} no longer provides "
            f"{len(lost)} of its images, first {lost[0]['sample_id']} ({lost[0]['reason']}): restore them"
        )
    views = dataset.store.sub("views")
    derived = [f for view in map(views.sub, views.folders()) for f in (ShardFolder(view.sub("rows")), *_teachers(view))]
    dataset.images.commit(
        shard,
        pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA),
        facts={"bad": bad, "seconds": round(time.perf_counter() - started, 3)},
        before_listing=partial(_unlist_derived, "images", derived),
    )


def commit_crops(dataset: Dataset, shard: int) -> None:
    """Draw the crops of a shard of images, and commit them; UserError if the images are missing."""
    record = complete_record(dataset.images, shard)
    images, rows = dataset.images.read(record, ["sample_id", "image"]), []
    for sample_id, data in zip(images["sample_id"].to_pylist(), images["image"], strict=True):
        views = dataset.policy.views(sample_id, *image_size(data.as_py()))
        rows += [view_row(sample_id, number, view) for number, view in enumerate(views)]
    dataset.rows.commit(
        shard,
        pa.Table.from_pylist(rows, schema=ROWS_SCHEMA),
        facts={"images": record.file},
        before_listing=partial(_unlist_derived, "rows", _teachers(dataset.view)),
    )


def _teachers(view: Store) -> list[ShardFolder]:
    teachers = view.sub("teachers")
    return [ShardFolder(teachers.sub(name)) for name in teachers.folders()]


def _unlist_derived(part: str, folders: Iterable[ShardFolder], record: ShardRecord) -> None:
    """Unlist what was derived from another file of ``images`` or ``rows`` than this record's."""
    for folder in folders:
        derived = folder.listing(record.shard)
        if derived is not None and derived.facts.get(part) != record.file:
            log.warning(
                "%s: shard %d was derived from other %s than the present ones (changed images, or another version of "
                "pyarrow): it will be computed again",
                folder.store.uri,
                record.shard,
                part,
            )
            folder.unlist(record.shard)
            discard_stats(folder)


def _unreadable(data: bytes | Exception) -> str:
    """Why an image cannot be used, or "".

    Pillow silently decodes around damage inside a JPEG's scan data; a strict decode finds most of it.
    """
    if isinstance(data, Exception):
        return f"{type(data).__name__}: {data}"
    if decode_upright_jpeg(data) is not None:
        return ""
    try:
        decode_image(data)
        if data.startswith(b"\xff\xd8"):
            stored = simplejpeg.decode_jpeg_header(data)[2]
            simplejpeg.decode_jpeg(data, colorspace="CMYK" if stored in ("CMYK", "YCCK") else "RGB", strict=True)
    except ValueError as error:
        return str(error)
    return ""


def check_quarantine(dataset: Dataset, records: Iterable[ShardRecord], max_bad: float) -> list[dict[str, str]]:
    """The ``sample_id`` and ``reason`` of the quarantined samples; UserError if their share exceeds `max_bad`."""
    bad = [sample for record in records for sample in record.facts["bad"]]
    if len(bad) > max_bad * dataset.count:
        first = ", ".join(f"{sample['sample_id']} ({sample['reason']})" for sample in bad[:10])
        raise UserError(
            f"{len(bad)} of {dataset.count} images of {dataset.location} cannot be read, more than data.max_bad={max_bad:g} "
            f"allows: {first}{', ...' if len(bad) > 10 else ''}; repair or remove them, or raise data.max_bad"
        )
    return bad
