"""Verify a shard: check its files, recompute a sample of rows and compare them with the stored ones."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipeline.cache.fill.extract import USER_ERRORS, Extract, by_share
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder
from pipeline.cache.layout.stats import Moments
from pipeline.cache.layout.target import cosine_figures
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, ViewRows
from pipeline.cache.maintain.checks import (
    BrokenError,
    Finding,
    Shard,
    check_derived_from,
    check_features,
    check_images,
    check_projections,
    check_rows_shard,
    finding,
    open_shard,
)
from pipeline.cache.maintain.values import check_values, compare
from pipeline.runtime import logs


class Verify:
    """Verifies one shard of images, crops and every teacher per call; a Ray Data row is a shard.

    Args:
        computed: the teachers that recompute rows; they are loaded once.
        sampled: row groups of images to be recomputed, by (part, shard).
        indices: keys of every part whose index is intact.
        frozen: statistics that recomputed features are standardised by, by (part, teacher).
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        teachers: Sequence[CachedTeacher],
        computed: Sequence[CachedTeacher],
        sampled: Mapping[tuple[str, int], Sequence[int]],
        indices: Mapping[str, list[bytes]],
        frozen: Mapping[tuple[str, str], Mapping[str, Moments]],
        device: str,
        threads: int,
        batch_size: int,
    ) -> None:
        self.parts, self.teachers, self.sampled = parts, teachers, sampled
        self.indices, self.frozen = indices, frozen
        self.extract = Extract(parts, [], computed, device, threads, batch_size)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Verify `row["shard"]` of `row["part"]`.

        Returns:
            The row with ``findings`` (JSON list of `Finding`), ``files`` (Parquet files read), ``recomputed`` (rows times
            teachers), ``cosines`` (JSON list of teacher id, token type, number of recomputed vectors, and mean and 1st percentile
            of the cosines of their standardised values) and ``error`` (a user-fixable failure in one line, or "").
        """
        work = _ShardCheck(self, self.parts[row["part"]], int(row["shard"]))
        error = ""
        try:
            with logs.shard_context(row, "verify"):
                work.run()
        except USER_ERRORS as failure:
            error = self.extract.error_message(failure)
        findings = json.dumps([asdict(found) for found in work.findings])
        counts = {"files": work.files, "recomputed": work.recomputed}
        return {**row, "findings": findings, **counts, "cosines": json.dumps(work.cosines), "error": error}


class _ShardCheck:
    """The checks of one shard, and their findings."""

    def __init__(self, verify: Verify, part: Part, shard: int) -> None:
        self.verify, self.part, self.shard = verify, part, shard
        self.findings: list[Finding] = []
        self.cosines: list[list[object]] = []
        self.files = self.recomputed = 0
        self.sources: dict[str, str] = {}  # the intact file of crops

    @contextmanager
    def _report(self, what: str, folder: ShardFolder) -> Iterator[None]:
        """Add a finding if the block finds a file of the folder broken."""
        try:
            yield
        except BrokenError as broken:
            self.findings.append(finding(self.part.cache, self.part.id, what, folder.store, self.shard, broken))

    def run(self) -> None:
        images = self._images()
        rows = self._rows(images)
        intact = {teacher.id: self._teacher(teacher, rows) for teacher in self.verify.teachers}
        asked = {name: shard for name, shard in intact.items() if shard and name in self.verify.extract.teachers}
        for group in self.verify.sampled.get((self.part.key, self.shard), ()):
            if images is not None and rows is not None and asked:
                self._recompute(ViewRows(images, rows, self.sources), asked, group)

    def _images(self) -> pa.Table | None:
        self.files += 1
        with self._report("images", self.part.images):
            keys, first = self.verify.indices.get(self.part.id), self.shard * self.part.shard_size
            opened = open_shard(self.part.images, self.shard)
            return check_images(opened, keys and keys[first : first + self.part.shard_rows(self.shard)])
        return None

    def _rows(self, images: pa.Table | None) -> pa.Table | None:
        """The rows that every teacher's shard must have, or None if they are broken."""
        if not self.part.policy.crops:
            return None if images is None else images.select(ROWS_SCHEMA.names)
        self.files += 1
        with self._report("rows", self.part.rows):
            opened = open_shard(self.part.rows, self.shard)
            rows = check_rows_shard(self.part, opened, images)
            self.sources["rows"] = opened.record.file
            return rows
        return None

    def _teacher(self, teacher: CachedTeacher, rows: pa.Table | None) -> Shard | None:
        """The shard, or None if its own files are broken."""
        folder = self.part.teacher(teacher.id)
        self.files += 1
        with self._report(teacher.id, folder):
            opened = open_shard(folder, self.shard)
            check_features(teacher, opened, rows)
            check_derived_from(opened, self.sources)
            if codecs := self._codecs(teacher):
                if opened.record.projection != folder.projection:
                    raise opened.broken(f"was encoded with another projection than {folder.projection}")
                check_values(folder, teacher, opened, codecs)
                return opened
        return None

    def _codecs(self, teacher: CachedTeacher) -> dict[str, FeatureCodec] | None:
        """Codecs, or None if the projection is broken, which is reported once per folder and not for every shard."""
        try:
            return teacher.codecs(check_projections(self.part.cache, teacher))
        except BrokenError:
            return None

    def _recompute(self, shard: ViewRows, asked: dict[str, Shard], group: int) -> None:
        """Recompute a row group of images with these teachers; a teacher that differs is dropped from `asked`."""
        whole, cached = shard.slice(group * ROW_GROUP_SIZE, ROW_GROUP_SIZE), self.verify.extract.cached
        for some in by_share(cached[name] for name in asked).values():
            views = whole.of_images(some[0].asked(whole.images["key"]))
            self._compare(views, {teacher.id: asked[teacher.id] for teacher in some}, asked, group)

    def _compare(self, views: ViewRows, some: Mapping[str, Shard], asked: dict[str, Shard], group: int) -> None:
        outputs = list(self.verify.extract.features(views, list(some)))
        for name, opened in some.items():
            teacher = self.verify.extract.cached[name]
            codecs = self._codecs(teacher)
            assert codecs is not None
            self.recomputed += views.rows.num_rows
            del asked[name]
            with self._report(name, self.part.teacher(name)):
                frozen = self.verify.frozen.get((self.part.key, name), {})
                found = compare(teacher, codecs, opened, group, [output[name] for output in outputs], frozen)
                asked[name] = opened
                for kind, cosines in found.items():
                    if figures := cosine_figures(cosines):
                        self.cosines.append([name, kind, len(cosines), *figures.values()])
