"""Row groups of complete shards, the join of a teacher's features with the rows of the view, and the samples in a row group."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.dataset import Dataset, group_rows
from pipeline.cache.layout.shards import RowGroup, ShardFolder, keys_of, record_name, selected
from pipeline.errors import UserError
from pipeline.storage.store import report_damage

NO_LABEL = -1
"""Label of a sample without a label."""
PARTS_HELD = 256
"""Parts whose samples a reader holds in memory."""


class Samples(NamedTuple):
    """The samples in a row group: names, labels [N] int64 (`NO_LABEL` for none), and the row of each one's image [N] int64."""

    names: list[str]
    labels: np.ndarray
    rows: np.ndarray


class SampleReader:
    """Reads which images of a row group are samples of a data set, and what they are called."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._part = lru_cache(PARTS_HELD)(self._read)

    def read(self, group: RowGroup) -> Samples:
        """The samples in a row group, in the order of their images; UserError if the file is damaged."""
        names, labels, rows = self._part(group.part)
        first, last = group_rows(self.dataset.parts[group.part], group.shard, group.group)
        chosen = slice(*np.searchsorted(rows, [first, last]))
        return Samples(names[chosen].to_pylist(), labels[chosen], rows[chosen] - first)

    def _read(self, number: int) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        table = self.dataset.samples(number, ["sample_id", "label", "row"]).combine_chunks()
        labels = table["label"].fill_null(NO_LABEL).to_numpy()
        return table["sample_id"].chunk(0), labels, table["row"].to_numpy()


class ShardReader:
    """Reads row groups of a folder of every part; UserError, which calls it `name`, unless all its shards are complete.

    Each file's footer is read once; the page checksums of a row group are verified at its first read.
    """

    def __init__(self, folders: Sequence[ShardFolder], dataset: Dataset, name: str) -> None:
        self.folders, self.name = folders, name
        self.records = [part.records(folder) for part, folder in zip(dataset.parts, folders, strict=True)]
        for number, (folder, records) in enumerate(zip(folders, self.records, strict=True)):
            needed = dataset.shards_of(number)
            if lacking := [shard for shard in needed if shard not in records]:
                raise UserError(
                    f"{name} has {len(needed) - len(lacking)} of {len(needed)} shards in {folder.store.uri}: run "
                    "jobs/precompute.py with this recipe"
                )
        self._footers: dict[tuple[int, int], pq.FileMetaData] = {}
        self._verified: set[RowGroup] = set()

    def read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """The rows of a row group; UserError if the file is missing or damaged."""
        store, record = self.folders[group.part].store, self.records[group.part][group.shard]
        options = {
            "metadata": self._footers.get((group.part, group.shard)),
            "page_checksum_verification": group not in self._verified,
        }
        with (
            report_damage(f"{store.uri}/{record.file}"),
            pq.ParquetFile(store.open(record.file), **options) as opened,
        ):
            table = selected(opened.read_row_group(group.group, columns=columns, use_threads=False), columns)
            self._footers[group.part, group.shard] = opened.metadata
            self._verified.add(group)
            return table


class FeatureReader(ShardReader):
    """Reads one teacher's features, and checks that they belong to the rows that they are joined with."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        super().__init__([part.teacher(teacher.id) for part in dataset.parts], dataset, teacher.id)
        self.codecs = load_codecs(dataset.cache, teacher)
        self.widths = {kind: codec.row_bytes for kind, codec in self.codecs.items()}

    def read_aligned(self, group: RowGroup, rows: pa.Table) -> pa.Table:
        """All features of a row group; UserError if their keys are not those of `rows`, in the same order."""
        table = self.read(group, ["key", "view", *self.widths])
        if not (rows["key"].equals(table["key"]) and rows["view"].equals(table["view"])):
            raise self.key_error(group, keys_of(rows), keys_of(table))
        return table

    def key_error(self, group: RowGroup, expected: Sequence[object], found: Sequence[object]) -> UserError:
        """The error for a shard whose keys are not those of its images: names the first difference."""
        lengths = f"{len(expected)} rows", f"{len(found)} rows"
        wanted, present = next((pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), lengths)
        return UserError(
            f"shard {group.shard} of {self.name} does not hold the keys of its images: found {present}, expected {wanted}; "
            f"delete {self.folders[group.part].store.uri}/{record_name(group.shard)} and run the job again"
        )


def image_reader(dataset: Dataset) -> ShardReader:
    """Reads the images of a data set."""
    return ShardReader([part.images for part in dataset.parts], dataset, "images")
