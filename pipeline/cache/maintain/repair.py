"""Repair a cache: unlist just what verification found broken, compute it again, and verify it."""

from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import CachePlan, SplitPlan, all_parts, build_cache, ingest_missing, read_again
from pipeline.cache.fill.listing import Listing
from pipeline.cache.layout.part import Part, write_index
from pipeline.cache.maintain.audit import Verification, verify_cache
from pipeline.cache.maintain.checks import Finding
from pipeline.sources.base import INDEX_SCHEMA
from pipeline.storage.store import Store


def repair_cache(plan: CachePlan, config: CacheJobConfig, found: Verification) -> tuple[CachePlan, Verification]:
    """Compute what is broken again, and verify the affected shards; returns the plan and the findings that are left.

    Shards of a teacher that cannot be computed here (`Verification.unable`) stay as they are, even if broken.

    Raises:
        UserError, TeacherError: as `build_cache`, and if the source no longer provides the images of a broken shard.
    """
    mine = [item for item in found.findings if item.what not in found.unable]
    for part in all_parts(plan.splits).values():
        _remove_from_part(part, [item for item in mine if item.place == part.id])
        part.refresh()
    for item in mine:
        if item.what == item.place or item.file.endswith(("/stats.npz", "/phi_s.npz")):
            _remove(plan.store, item)
    plan = replace(plan, splits=tuple(_without_differing(split, mine) for split in plan.splits))
    ingest_missing(plan.splits)
    able = replace(plan, teachers=tuple(teacher for teacher in plan.teachers if teacher.id not in found.unable))
    able, _ = build_cache(able, config)
    repaired = replace(plan, splits=able.splits)
    return repaired, verify_cache(repaired, config, _affected(repaired, found))


def _remove_from_part(part: Part, found: Iterable[Finding]) -> None:
    for item in found:
        if item.what == "index":
            _write_index(part)
        elif item.shard is not None:
            folder = {"images": part.images, "rows": part.rows}.get(item.what) or part.teacher(item.what)
            folder.unlist(item.shard)


def _write_index(part: Part) -> None:
    """Write the index of a part again, from its images."""
    tables = [part.images.read(record, ["key", "image"]) for record in part.images.listed().values()]
    images = pa.concat_tables(tables)
    write_index(part, pa.table([images["key"], pc.binary_length(images["image"])], names=["key", "size"]))


def _remove(cache: Store, item: Finding) -> None:
    """Delete a file that belongs to all shards: what is derived from it is computed again."""
    folder, _, name = item.file.rpartition("/")
    if item.what == item.place and not name.startswith(("projection-", "teacher.json")):
        return
    cache.sub(folder).delete(name)
    if name == "stats.npz":
        cache.sub(folder).delete("phi_s.npz")


def _without_differing(split: SplitPlan, found: Iterable[Finding]) -> SplitPlan:
    """The plan of a split whose images that the source gives otherwise now are new."""
    if not any(item.what == "source" and item.place == split.dataset.id for item in found):
        return split
    differing = read_again(split)["sample_id"].combine_chunks()
    kept, new = {}, [split.new]
    for name, rows in split.listing.known.items():
        wrong = pc.is_in(rows["sample_id"], differing)
        new.append(rows.filter(wrong).select(INDEX_SCHEMA.names))
        if (some := rows.filter(pc.invert(wrong))).num_rows:
            kept[name] = some
    return replace(split, listing=Listing(kept, split.listing.bad, pa.concat_tables(new)))


def _affected(plan: CachePlan, found: Verification) -> set[tuple[str, int]]:
    """(part, shard) of every finding; a file that belongs to all shards affects them all."""
    affected = set()
    for key, part in all_parts(plan.splits).items():
        for item in found.findings:
            if item.shard is not None and item.place == part.id:
                affected.add((key, item.shard))
            elif item.shard is None:
                affected |= {(key, shard) for shard in range(part.shards)}
    return affected
