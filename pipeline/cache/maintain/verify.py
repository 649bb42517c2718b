"""Verify shards: their files are checked, and a sample of rows is computed again and compared with what is stored.

This module imports neither Ray nor MLflow; `pipeline/cache/maintain/audit.py` runs it over all shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.fill.extract import USER_ERRORS, Extract
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, ViewRows
from pipeline.cache.maintain.checks import (
    TOLERANCE,
    BrokenError,
    Finding,
    Shard,
    check_derived_from,
    check_features,
    check_images,
    check_projection,
    check_rows_shard,
    check_values,
    decode,
    finding,
    open_shard,
)
from pipeline.runtime import logs
from teachers.base import TeacherOutput


class Verify:
    """Verifies one shard of images, of crops and of every teacher a call; a Ray Data row is a shard.

    Args:
        datasets: by split (``train``, ``val``).
        teachers: whose shards are verified.
        computed: those of them that are asked again; they are loaded once.
        sampled: by (split, shard), the row groups of images that they are asked about.
        unindexed: ids of the datasets whose index is broken, so that keys cannot be held against it.
        device, threads, batch_size: as of `Extract`.
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
            teachers), and as ``error`` a failure that the user can mend.
        """
        work = _ShardCheck(self, row["split"], int(row["shard"]))
        error = ""
        try:
            with logs.shard_context(row, "verify"):
                work.run()
        except USER_ERRORS as failure:
            error = self.extract.error_message(failure)
        findings = json.dumps([asdict(found) for found in work.findings])
        return {**row, "findings": findings, "files": work.files, "recomputed": work.recomputed, "error": error}


class _ShardCheck:
    """The checks of one shard, and what they find."""

    def __init__(self, verify: Verify, split: str, shard: int) -> None:
        self.verify, self.split, self.shard = verify, split, shard
        self.dataset = verify.datasets[split]
        self.findings: list[Finding] = []
        self.files = self.recomputed = 0
        self.sources: dict[str, str] = {}  # intact files of images and crops

    def run(self) -> None:
        images = self._images()
        rows = self._rows(images)
        healthy = {teacher.id: self._teacher(teacher, rows) for teacher in self.verify.teachers}
        asked = {name: shard for name, shard in healthy.items() if shard and name in self.verify.extract.teachers}
        for group in self.verify.sampled.get((self.split, self.shard), ()):
            if images is not None and rows is not None and asked:
                self._recompute(ViewRows(images, rows, self.sources), asked, group)

    def _images(self) -> pa.Table | None:
        folder = self.dataset.images
        try:
            self.files += 1
            index = None if self.dataset.id in self.verify.unindexed else self.dataset.shard_index(self.shard)
            opened = open_shard(folder, self.shard)
            images = check_images(opened, index)
        except BrokenError as broken:
            self.findings.append(finding(self.dataset, "images", folder.store, self.shard, broken))
            return None
        self.sources["images"] = opened.record.file
        return images

    def _rows(self, images: pa.Table | None) -> pa.Table | None:
        """The keys that every teacher is to hold, if they can be told."""
        if not self.dataset.policy.crops:
            return None if images is None else images.select(ROWS_SCHEMA.names)
        folder = self.dataset.rows
        try:
            self.files += 1
            opened = open_shard(folder, self.shard)
            rows = check_rows_shard(self.dataset, opened, images)
            check_derived_from(opened, self.sources)
        except BrokenError as broken:
            self.findings.append(finding(self.dataset, "rows", folder.store, self.shard, broken))
            return None
        self.sources["rows"] = opened.record.file
        return rows

    def _teacher(self, teacher: CachedTeacher, rows: pa.Table | None) -> Shard | None:
        """The shard, if it is healthy as far as its own files tell."""
        folder = self.dataset.teacher(teacher.id)
        try:
            self.files += 1
            opened = open_shard(folder, self.shard)
            check_features(teacher, opened, rows)
            check_derived_from(opened, self.sources)
            codecs = self._codecs(teacher)
            if codecs is None:
                return None
            if opened.record.projection != folder.projection:
                raise opened.broken(f"was encoded with another projection than {folder.projection}")
            check_values(folder, teacher, opened, codecs)
            return opened
        except BrokenError as broken:
            self.findings.append(finding(self.dataset, teacher.id, folder.store, self.shard, broken))
            return None

    def _codecs(self, teacher: CachedTeacher) -> dict[str, FeatureCodec] | None:
        """Decoders, or None where the projection is broken: that is found once for the folder, not for every shard."""
        try:
            return teacher.codecs(check_projection(self.dataset.teacher(teacher.id), teacher))
        except BrokenError:
            return None

    def _recompute(self, shard: ViewRows, asked: dict[str, Shard], group: int) -> None:
        """Compute a row group of images again with these teachers; one that differs is not asked again."""
        views = shard.slice(group * ROW_GROUP_SIZE, ROW_GROUP_SIZE)
        outputs = list(self.verify.extract.features(views, list(asked)))
        for name, opened in list(asked.items()):
            teacher = self.verify.extract.cached[name]
            codecs = self._codecs(teacher)
            assert codecs is not None
            self.recomputed += views.rows.num_rows
            try:
                compare(teacher, codecs, opened, group, [output[name] for output in outputs])
            except BrokenError as broken:
                del asked[name]
                folder = self.dataset.teacher(name).store
                self.findings.append(finding(self.dataset, name, folder, self.shard, broken))


def compare(
    teacher: CachedTeacher, codecs: dict[str, FeatureCodec], opened: Shard, group: int, outputs: Sequence[TeacherOutput]
) -> None:
    """Compare a row group with what the teacher says of the same pixels now.

    The triangle inequality gives the bound of a row's relative error: what the codec loses of these very features, and
    what the arithmetic of another device may change (`TOLERANCE`). The fidelity in the shard's record is a mean over
    other rows, and would cry wolf at the ones that are hardest to keep.

    Raises:
        BrokenError: where a row differs by more.
    """
    stored = opened.read_group(group)
    for kind, codec in codecs.items():
        features: Tensor = torch.cat([getattr(output, kind) for output in outputs]).cpu()
        try:
            kept = codec.decode(torch.from_numpy(codec.encode(features)))
        except ValueError as error:
            raise opened.broken(f"is of images of which the teacher now gives {kind} {error}") from error
        loss = relative_errors(features, decode(stored[kind], codec))
        bound = relative_errors(features, kept) + TOLERANCE[teacher.precision]
        if wrong := (loss > bound).nonzero().flatten().tolist():
            row = wrong[0]
            raise opened.broken(
                f"holds other {kind} than the teacher gives: {len(wrong)} of {len(loss)} rows computed again differ, first "
                f"{stored['sample_id'][row]} view {stored['view'][row]} by {loss[row]:.3f}, allowed {bound[row]:.3f}"
            )


def relative_errors(features: Tensor, kept: Tensor) -> Tensor:
    """Norm of the difference over that of the features, by row [N]; next to nothing counts as a thousandth of the mean."""
    sizes = features.flatten(1).norm(dim=1)
    return (kept - features).flatten(1).norm(dim=1) / sizes.clamp_min(float(sizes.mean()) * 1e-3 + 1e-30)
