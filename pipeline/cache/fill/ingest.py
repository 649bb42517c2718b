"""Source -> `images` shards: the spine of keys and pixels that every teacher aligns with.

An image that cannot be decoded never enters the spine: it is quarantined with its reason in the shard's record.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import simplejpeg

from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ShardRecord
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, commit_images, row
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image, decode_plain
from pipeline.imaging.geometry import FULL
from pipeline.runtime import logs
from pipeline.sources.base import Source

IMAGES_SCHEMA = pa.schema([*ROWS_SCHEMA, pa.field("label", pa.int64()), pa.field("image", pa.binary(), nullable=False)])
"""The rows of the view ``full``, the label, the encoded image."""


@dataclass(frozen=True)
class Ingest:
    """Commits one shard of `images` a call; a Ray Data row is a shard.

    Attributes:
        splits: dataset and source by split (``train``, ``val``).
        known: by split and shard, the ids that were quarantined before; a shard that comes back with more is refused.
    """

    splits: Mapping[str, tuple[Dataset, Source]]
    known: Mapping[tuple[str, int], Set[str]] = field(default_factory=dict)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ingest `row["shard"]` of `row["split"]`.

        A failure that the user can mend comes back as ``error``, so that it stays one clear line.
        """
        dataset, source = self.splits[row["split"]]
        shard = int(row["shard"])
        try:
            with logs.shard_context(row, "index"):
                if dataset.images.record(shard) is None:
                    _commit(dataset, source, shard, self.known.get((row["split"], shard)))
        except UserError as error:
            return {**row, "images": 0, "error": str(error)}
        return {**row, "images": dataset.shard_rows(shard), "error": ""}


def _commit(dataset: Dataset, source: Source, shard: int, known: Set[str] | None) -> None:
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
            rows.append({**row(sample_id, 0, FULL), "label": label, "image": data})
    if known is not None:
        _refuse_loss(dataset, shard, [sample for sample in bad if sample["sample_id"] not in known])
    facts = {"bad": bad, "seconds": round(time.perf_counter() - started, 3)}
    commit_images(dataset, shard, pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA), facts)


def _refuse_loss(dataset: Dataset, shard: int, lost: Sequence[dict[str, str]]) -> None:
    if lost:
        raise UserError(
            f"shard {shard} of {dataset.images.store.uri} is broken, and {dataset.location} does not give "
            f"{len(lost)} of its images any more, first {lost[0]['sample_id']} ({lost[0]['reason']}): restore them"
        )


def _unreadable(data: bytes | Exception) -> str:
    """Why an image cannot be used, or "".

    Pillow decodes around damage inside a JPEG's scan data without a word; a strict decode finds most of it.
    """
    if isinstance(data, Exception):
        return f"{type(data).__name__}: {data}"
    if decode_plain(data) is not None:
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
    """The quarantined samples of a dataset, each with ``sample_id`` and ``reason``.

    Raises:
        UserError: where they are more than the share `max_bad` of all samples, naming the first ones.
    """
    bad = [sample for record in records for sample in record.facts["bad"]]
    if len(bad) > max_bad * dataset.count:
        first = ", ".join(f"{sample['sample_id']} ({sample['reason']})" for sample in bad[:10])
        raise UserError(
            f"{len(bad)} of {dataset.count} images of {dataset.location} cannot be read, more than data.max_bad={max_bad:g} "
            f"allows: {first}{', ...' if len(bad) > 10 else ''}; repair or remove them, or raise data.max_bad"
        )
    return bad
