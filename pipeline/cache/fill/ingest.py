"""Source or staging -> `images` shards of parts, and row shards of crops: keys and pixels that all teachers' shards align with.

The record of features of crops names the file of the crops, whose name contains the hash of its content. Before other crops are
listed, features of the old ones are unlisted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.fill.digest import packed, unpacked
from pipeline.cache.fill.staging import PLACES_SCHEMA, read_staged
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.part import KEY, Part, image_key
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder, ShardRecord
from pipeline.cache.layout.view_rows import IMAGES_SCHEMA, complete_record, rows_schema, view_row
from pipeline.errors import UserError
from pipeline.imaging.decode import image_size
from pipeline.imaging.geometry import FULL, ViewPolicy
from pipeline.imaging.mixup import draw_mixes
from pipeline.runtime import logs
from pipeline.sources.base import Source
from pipeline.sources.left_out import some
from pipeline.storage.store import Store

log = logging.getLogger(__name__)


def ingest_row(split: str, part: Part, shard: int, samples: pa.Table, places: pa.Table | None = None) -> dict[str, Any]:
    """The row for `Ingest` of a shard of a part, some of whose images these samples (`SAMPLE_SCHEMA`) of a split are.

    Args:
        places: where images are staged (`PLACES_SCHEMA`), these among them; None: nowhere.
    """
    first = shard * part.shard_size
    rows = samples["row"]
    mine = samples.filter(pc.and_(pc.greater_equal(rows, first), pc.less(rows, first + part.shard_rows(shard))))
    places = PLACES_SCHEMA.empty_table() if places is None else places
    staged = places.filter(pc.is_in(places["key"], mine["key"].combine_chunks()))
    row = {"split": split, "part": part.key, "shard": shard}
    return {**row, "listed": packed(mine.sort_by("row")), "staged": packed(staged)}


@dataclass(frozen=True)
class Ingest:
    """Commits a shard of `images` and, for a view of crops, its row shard, unless they exist. A Ray Data row is a shard.

    Attributes:
        parts: by part and view.
        sources: by split.
    """

    parts: Mapping[str, Part]
    sources: Mapping[str, Source]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ingest `row["shard"]` of `row["part"]`; returns the row with ``error``, a user-fixable failure in one line."""
        part, source, shard = self.parts[row["part"]], self.sources[row["split"]], int(row["shard"])
        try:
            with logs.shard_context(row, "index"):
                if part.images.record(shard) is None:
                    _commit_images(part, source, shard, unpacked(row["listed"]), unpacked(row["staged"]))
                if part.policy.crops and part.rows.record(shard) is None:
                    commit_crops(part, shard)
        except UserError as error:
            return {**row, "error": str(error)}
        return {**row, "error": ""}


def _commit_images(part: Part, source: Source, shard: int, listed: pa.Table, staged: pa.Table) -> None:
    """Commit a shard of images, which are staged, or are read again where the source lists them."""
    keys = part.index()["key"].slice(shard * part.shard_size, part.shard_rows(shard)).to_pylist()
    found = dict(read_staged(part.cache, staged))
    reasons = {}
    listed = listed.filter(pc.invert(pc.is_in(listed["key"], pa.array([*found], KEY))))
    if staged.num_rows and listed.num_rows:
        log.warning("%s are damaged or gone: %d images are read again from %s", *_about(staged, listed))
    names = zip(listed["sample_id"].to_pylist(), listed["key"].to_pylist(), strict=True)
    for (name, key), data in zip(names, source.read(listed), strict=True):
        if isinstance(data, Exception):
            reasons[key] = f"{name} ({type(data).__name__}: {data})"
        elif image_key(data) != key:
            reasons[key] = f"{name} (other bytes than before)"
        else:
            found[key] = data
    lost = [key for key in keys if key not in found]
    if lost:
        first = next((reasons[key] for key in lost if key in reasons), "an image that it does not list")
        raise UserError(
            f"{source.location} does not provide {len(lost)} images of shard {shard} of {part.images.store.uri}, first "
            f"{first}: restore them, or run jobs/precompute.py with this recipe and --verify --repair to do without them"
        )
    rows = [{**view_row(key, 0, FULL), "image": found[key]} for key in keys]
    part.images.commit(shard, pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA))


def _about(staged: pa.Table, listed: pa.Table) -> tuple[str, int, str]:
    pieces, archives = (sorted(pc.unique(column).to_pylist()) for column in (staged["piece"], listed["uri"]))
    return some(pieces), listed.num_rows, some(archives)


def commit_crops(part: Part, shard: int) -> None:
    """Draw the crops of a shard of images, and commit them; UserError if the images are missing."""
    images, rows = part.images.read(complete_record(part.images, shard), ["key", "image"]), []
    keys = images["key"].to_pylist()
    for place, (key, data) in enumerate(zip(keys, images["image"], strict=True)):
        views = part.policy.views(key.hex(), *image_size(data.as_py()))
        mixes = _mixes(part.policy, keys, place)
        rows += [view_row(key, number, view) | mixes[number] for number, view in enumerate(views)]
    table = pa.Table.from_pylist(rows, schema=rows_schema(part.policy))
    part.rows.commit(shard, table, before_listing=partial(_unlist_features, part.view.sub("teachers")))


def _mixes(policy: ViewPolicy, keys: Sequence[bytes], place: int) -> list[dict[str, Any]]:
    """What the rows of an image of a shard have besides, of `MIXUP_SCHEMA`: partners are images of the same row group."""
    if not policy.mixup:
        return [{}] * policy.rows_per_image
    first = place // ROW_GROUP_SIZE * ROW_GROUP_SIZE
    group = keys[first : first + ROW_GROUP_SIZE]
    drawn = draw_mixes(policy.mixup, policy.seed, keys[place].hex(), place - first, len(group), policy.crops)
    return [
        {"partner": group[mix.partner], "mix": mix.share} if mix else {"partner": None, "mix": 1.0} for mix in drawn
    ]


def _unlist_features(teachers: Store, record: ShardRecord) -> None:
    """Unlist the features of other crops than those that this record lists."""
    for folder in (ShardFolder(teachers.sub(name)) for name in teachers.folders()):
        derived = folder.listing(record.shard)
        if derived is not None and derived.facts.get("rows") != record.file:
            log.warning(
                "%s: shard %d was derived from other crops than the present ones (another version of pyarrow or numpy): it "
                "will be computed again",
                folder.store.uri,
                record.shard,
            )
            folder.unlist(record.shard)


def check_quarantine(dataset: Dataset, bad: pa.Table, max_bad: float) -> list[dict[str, str]]:
    """The ``sample_id`` and ``reason`` of the samples that cannot be used; UserError if their share exceeds `max_bad`."""
    samples, count = bad.select(["sample_id", "reason"]).to_pylist(), dataset.count + bad.num_rows
    if len(samples) > max_bad * count:
        first = ", ".join(f"{sample['sample_id']} ({sample['reason']})" for sample in samples[:10])
        raise UserError(
            f"{len(samples)} of {count} images of {dataset.location} cannot be read, more than data.max_bad={max_bad:g} "
            f"allows: {first}{', ...' if len(samples) > 10 else ''}; repair or remove them, or raise data.max_bad"
        )
    return samples
