"""Row groups of complete shards, and the join of a teacher's features with the rows of the view."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import RowGroup, ShardFolder, keys_of, record_name, selected
from pipeline.errors import UserError
from pipeline.storage.store import report_damage

NO_LABEL = -1
"""Label of a sample without a label."""


class ShardReader:
    """Reads row groups of a folder; UserError, which calls it `name`, unless all its shards are complete.

    Each file's footer is read once; the page checksums of a row group are verified at its first read.
    """

    def __init__(self, dataset: Dataset, folder: ShardFolder, name: str) -> None:
        self.folder, self.name, self.records = folder, name, dataset.records(folder)
        if len(self.records) != dataset.shards:
            raise UserError(
                f"{name} has {len(self.records)} of {dataset.shards} shards in {folder.store.uri}: run jobs/precompute.py "
                "with this recipe"
            )
        self._footers: dict[int, pq.FileMetaData] = {}
        self._verified: set[RowGroup] = set()

    def read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """The rows of a row group; UserError if the file is missing or damaged."""
        file = self.records[group.shard].file
        options = {
            "metadata": self._footers.get(group.shard),
            "page_checksum_verification": group not in self._verified,
        }
        with (
            report_damage(f"{self.folder.store.uri}/{file}"),
            pq.ParquetFile(self.folder.store.open(file), **options) as opened,
        ):
            table = selected(opened.read_row_group(group.group, columns=columns, use_threads=False), columns)
            self._footers[group.shard] = opened.metadata
            self._verified.add(group)
            return table


class FeatureReader(ShardReader):
    """Reads one teacher's features, and checks that they belong to the rows that they are joined with."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        super().__init__(dataset, dataset.teacher(teacher.id), teacher.id)
        self.codecs = load_codecs(dataset, teacher)
        self.widths = {kind: codec.row_bytes for kind, codec in self.codecs.items()}

    def read_aligned(self, group: RowGroup, rows: pa.Table) -> pa.Table:
        """All features of a row group; UserError if their keys are not those of `rows`, in the same order."""
        table = self.read(group, ["sample_id", "view", *self.widths])
        if not (rows["sample_id"].equals(table["sample_id"]) and rows["view"].equals(table["view"])):
            raise self.key_error(group, keys_of(rows), keys_of(table))
        return table

    def key_error(self, group: RowGroup, expected: Sequence[object], found: Sequence[object]) -> UserError:
        """The error for a shard whose keys are not those of its images: names the first difference."""
        lengths = f"{len(expected)} rows", f"{len(found)} rows"
        wanted, present = next((pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), lengths)
        return UserError(
            f"shard {group.shard} of {self.name} does not hold the keys of its images: found {present}, expected {wanted}; "
            f"delete {self.folder.store.uri}/{record_name(group.shard)} and run the job again"
        )


def labels_of(images: pa.Table) -> np.ndarray:
    """Labels [N] int64 of rows of `images`, `NO_LABEL` for a sample without one."""
    return images["label"].fill_null(NO_LABEL).to_numpy()
