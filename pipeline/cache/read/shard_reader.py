"""Row groups of complete shards, the join of a teacher's features with the rows of the view, and the samples in a row group."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.dataset import Dataset, group_rows
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.shards import RowGroup, ShardFolder, keys_of, record_name, selected
from pipeline.errors import UserError
from pipeline.storage.store import report_damage

NO_LABEL = -1
"""Label of a sample without a label."""
PARTS_HELD = 256
"""Parts whose samples a reader holds in memory."""
FOOTERS_HELD = 4096
"""Files whose footers a reader holds in memory."""


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
    """Reads row groups of a folder of every part; UserError, which calls it `name`, where a shard is missing.

    The records of a part are read at its first row group. Of recently read files the footers are kept; the page checksums of a
    row group are verified at its first read.
    """

    def __init__(self, folders: Callable[[Part], ShardFolder], dataset: Dataset, name: str) -> None:
        self.folders, self.dataset, self.name = folders, dataset, name
        self._footers: dict[str, pq.FileMetaData] = {}
        self._verified: defaultdict[tuple[int, int], set[int]] = defaultdict(set)

    def read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """The rows of a row group; UserError if the file is missing or damaged."""
        part = self.dataset.parts[group.part]
        folder = self.folders(part)
        record = part.records(folder).get(group.shard)
        if record is None:
            raise UserError(
                f"{self.name} lacks shard {group.shard} in {folder.store.uri}: run jobs/precompute.py with this recipe"
            )
        uri, verified = f"{folder.store.uri}/{record.file}", self._verified[group.part, group.shard]
        options = {"metadata": self._footers.get(uri), "page_checksum_verification": group.group not in verified}
        with report_damage(uri), pq.ParquetFile(folder.store.open(record.file), **options) as opened:
            table = selected(opened.read_row_group(group.group, columns=columns, use_threads=False), columns)
            if len(self._footers) >= FOOTERS_HELD:
                self._footers.clear()
            self._footers[uri] = opened.metadata
        verified.add(group.group)
        return table


class FeatureReader(ShardReader):
    """Reads one teacher's features, and checks that they belong to the rows that they are joined with."""

    def __init__(self, dataset: Dataset, teacher: CachedTeacher) -> None:
        super().__init__(lambda part: part.teacher(teacher.id), dataset, teacher.id)
        self.codecs, self.share = load_codecs(dataset.cache, teacher), teacher.share
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
            f"delete {self.folders(self.dataset.parts[group.part]).store.uri}/{record_name(group.shard)} and run the job again"
        )


def image_reader(dataset: Dataset) -> ShardReader:
    """Reads the images of a data set."""
    return ShardReader(lambda part: part.images, dataset, "images")
