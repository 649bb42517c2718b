"""Verify a shard: check its files, recompute a sample of rows and compare them with the stored ones."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipeline.cache.fill.extract import USER_ERRORS, Extract
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder
from pipeline.cache.layout.stats import Moments, load_moments
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
    load_file,
    open_shard,
)
from pipeline.cache.maintain.values import check_values, compare
from pipeline.runtime import logs


class Verify:
    """Verifies one shard of images, crops and every teacher per call; a Ray Data row is a shard.

    Args:
        computed: the teachers that recompute rows; they are loaded once.
        sampled: row groups of images to be recomputed, by (split, shard).
        unindexed: ids of the datasets whose index is broken, so that keys cannot be compared with it.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        teachers: Sequence[CachedTeacher],
        computed: Sequence[CachedTeacher],
        sampled: Mapping[tuple[str, int], Sequence[int]],
        unindexed: Set[str],
        device: str,
        threads: int,
        batch_size: int,
    ) -> None:
        self.datasets, self.teachers, self.sampled, self.unindexed = datasets, teachers, sampled, unindexed
        self.extract = Extract(datasets, computed, device, threads, batch_size)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Verify `row["shard"]` of `row["split"]`.

        Returns:
            The row with ``findings`` (JSON list of `Finding`), ``files`` (Parquet files read), ``recomputed`` (rows times
            teachers), ``cosines`` (JSON list of teacher id, token type, number of recomputed vectors, and mean and 1st percentile
            of the cosines of their standardised values) and ``error`` (a user-fixable failure in one line, or "").
        """
        work = _ShardCheck(self, row["split"], int(row["shard"]))
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

    def __init__(self, verify: Verify, split: str, shard: int) -> None:
        self.verify, self.split, self.shard = verify, split, shard
        self.dataset = verify.datasets[split]
        self.findings: list[Finding] = []
        self.cosines: list[list[object]] = []
        self.files = self.recomputed = 0
        self.sources: dict[str, str] = {}  # intact files of images and crops

    @contextmanager
    def _report(self, part: str, folder: ShardFolder) -> Iterator[None]:
        """Add a finding of this part if the block finds a file of the folder broken."""
        try:
            yield
        except BrokenError as broken:
            self.findings.append(finding(self.dataset, part, folder.store, self.shard, broken))

    def run(self) -> None:
        images = self._images()
        rows = self._rows(images)
        intact = {teacher.id: self._teacher(teacher, rows) for teacher in self.verify.teachers}
        asked = {name: shard for name, shard in intact.items() if shard and name in self.verify.extract.teachers}
        for group in self.verify.sampled.get((self.split, self.shard), ()):
            if images is not None and rows is not None and asked:
                self._recompute(ViewRows(images, rows, self.sources), asked, group)

    def _images(self) -> pa.Table | None:
        self.files += 1
        with self._report("images", self.dataset.images):
            index = None if self.dataset.id in self.verify.unindexed else self.dataset.shard_index(self.shard)
            opened = open_shard(self.dataset.images, self.shard)
            images = check_images(opened, index)
            self.sources["images"] = opened.record.file
            return images
        return None

    def _rows(self, images: pa.Table | None) -> pa.Table | None:
        """The rows that every teacher's shard must have, or None if they are broken."""
        if not self.dataset.policy.crops:
            return None if images is None else images.select(ROWS_SCHEMA.names)
        self.files += 1
        with self._report("rows", self.dataset.rows):
            opened = open_shard(self.dataset.rows, self.shard)
            rows = check_rows_shard(self.dataset, opened, images)
            check_derived_from(opened, self.sources)
            self.sources["rows"] = opened.record.file
            return rows
        return None

    def _teacher(self, teacher: CachedTeacher, rows: pa.Table | None) -> Shard | None:
        """The shard, or None if its own files are broken."""
        folder = self.dataset.teacher(teacher.id)
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
            return teacher.codecs(check_projections(self.dataset.teacher(teacher.id), teacher))
        except BrokenError:
            return None

    def _recompute(self, shard: ViewRows, asked: dict[str, Shard], group: int) -> None:
        """Recompute a row group of images with these teachers; a teacher that differs is dropped from `asked`."""
        views = shard.slice(group * ROW_GROUP_SIZE, ROW_GROUP_SIZE)
        outputs = list(self.verify.extract.features(views, list(asked)))
        for name, opened in list(asked.items()):
            teacher = self.verify.extract.cached[name]
            codecs = self._codecs(teacher)
            assert codecs is not None
            self.recomputed += views.rows.num_rows
            del asked[name]
            with self._report(name, self.dataset.teacher(name)):
                found = compare(
                    teacher, codecs, opened, group, [output[name] for output in outputs], self._frozen(teacher)
                )
                asked[name] = opened
                for kind, cosines in found.items():
                    if figures := cosine_figures(cosines):
                        self.cosines.append([name, kind, len(cosines), *figures.values()])

    def _frozen(self, teacher: CachedTeacher) -> Mapping[str, Moments]:
        """Statistics of the dataset; none if they are missing or broken, which is found elsewhere."""
        try:
            return load_file(self.dataset.teacher(teacher.id).store, "stats.npz", load_moments)
        except BrokenError:
            return {}
