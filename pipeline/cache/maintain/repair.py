"""Repair a cache: unlist just what verification found broken, compute it again, and verify it."""

from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.config import CacheJobConfig
from pipeline.cache.fill.build import BuildReport, build_cache, read_again, read_images
from pipeline.cache.fill.listing import list_source
from pipeline.cache.fill.plan import CachePlan, SplitPlan, all_parts
from pipeline.cache.fill.statistics import restore_statistics
from pipeline.cache.layout.part import PART_SCHEMA, Part, describe_part, part_id, write_index
from pipeline.cache.layout.part_stats import STATISTICS
from pipeline.cache.maintain.audit import Verification, verify_cache
from pipeline.cache.maintain.checks import Finding
from pipeline.errors import UserError
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store


def repair_cache(plan: CachePlan, config: CacheJobConfig, found: Verification) -> tuple[CachePlan, Verification]:
    """Compute what is broken again, and verify the affected shards; returns the plan and the findings that are left.

    Shards of a teacher that cannot be computed here (`Verification.unable`) stay as they are, even if broken.

    Raises:
        UserError, TeacherError: as `build_cache`, and if the source no longer provides the images of a broken shard.
    """
    mine = [item for item in found.findings if item.what not in found.unable]
    for part in all_parts(plan.splits).values():
        broken = [item for item in mine if item.place == part.id]
        _unlist(part, broken)
        part.refresh()
        _restore(part, broken, plan)
    for item in mine:
        if item.shard is None and item.what not in ("index", "source") and not item.file.endswith(f"/{STATISTICS}"):
            _remove(plan.store, item)
    splits = [_without_differing(_listed_again(split), mine) for split in plan.splits]
    plan = replace(plan, splits=read_images(splits, plan.shard_size, BuildReport()))
    able = replace(plan, teachers=tuple(teacher for teacher in plan.teachers if teacher.id not in found.unable))
    able, _ = build_cache(able, config)
    repaired = replace(plan, splits=able.splits)
    return repaired, verify_cache(repaired, config, _affected(repaired, found))


def _unlist(part: Part, found: Iterable[Finding]) -> None:
    for item in found:
        if item.shard is not None:
            folder = {"images": part.images, "rows": part.rows}.get(item.what) or part.teacher(item.what)
            folder.unlist(item.shard)


def _restore(part: Part, found: Iterable[Finding], plan: CachePlan) -> None:
    """Write the description, the index and the statistics of a part again, if they are broken."""
    teachers = {teacher.id: teacher for teacher in plan.teachers}
    for item in found:
        if item.file.endswith("/part.json"):
            describe_part(part)
        elif item.what == "index":
            write_index(part, _index(part, plan.splits))
        elif f"{part.cache.uri}/{item.file}" == f"{part.teacher(item.what).store.uri}/{STATISTICS}":
            restore_statistics(part, teachers[item.what])


def _index(part: Part, splits: Iterable[SplitPlan]) -> pa.Table:
    """The index of a part, from its images and from the samples that they are; UserError if some are known from neither."""
    rows: dict[int, tuple[bytes, int]] = {}
    for samples in (split.listing.samples(part.id) for split in splits):
        columns = (samples[name].to_pylist() for name in ("row", "key", "size"))
        rows |= {row: (key, size) for row, key, size in zip(*columns, strict=True)}
    for shard, record in part.records(part.images).items():
        images, first = part.images.read(record, ["key", "image"]), shard * part.shard_size
        sizes = pc.binary_length(images["image"]).to_pylist()
        rows |= {first + n: found for n, found in enumerate(zip(images["key"].to_pylist(), sizes, strict=True))}
    keys, sizes = ([rows[row][column] for row in sorted(rows)] for column in (0, 1))
    index = pa.table([keys, sizes], schema=PART_SCHEMA)
    if part_id(index) != part.id:
        raise UserError(
            f"{part.store.uri}/index.parquet cannot be restored, because images are missing as well: delete {part.store.uri} and "
            "run the job again"
        )
    return index


def _remove(cache: Store, item: Finding) -> None:
    """Delete a file that belongs to all shards: it is made again, and what is derived from it."""
    folder, _, name = item.file.rpartition("/")
    cache.sub(folder).delete(name)
    if name == "stats.npz":
        cache.sub(folder).delete("phi_s.npz")


def _listed_again(split: SplitPlan) -> SplitPlan:
    """The plan of a split, some of whose files of samples are gone: the images that they list are new."""
    if split.pinned:
        return split
    empty = replace(split.dataset, files=(), selections=(), bad="", draft={})
    listing, dataset = list_source(split.source, empty)
    return replace(split, listing=listing, dataset=dataset)


def _without_differing(split: SplitPlan, found: Iterable[Finding]) -> SplitPlan:
    """The plan of a split whose images that the source gives otherwise now are new."""
    if not any(item.what == "source" and item.place == folder_name(split.dataset.name) for item in found):
        return split
    differing = read_again(split)["sample_id"].combine_chunks()
    known, new = {}, [split.new]
    for part in split.dataset.parts:
        rows = split.listing.samples(part.id)
        wrong = pc.is_in(rows["sample_id"], differing)
        new.append(rows.filter(wrong).select(split.new.column_names))
        if (some := rows.filter(pc.invert(wrong))).num_rows:
            known[part.id] = some
    return replace(split, listing=replace(split.listing, known=known, kept={}, new=pa.concat_tables(new)))


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
