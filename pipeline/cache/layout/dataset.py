"""A data set in the cache: a version of what a source listed, as rows of parts with names and labels (docs/cache.md).

A version is a small file that names one file of rows per part. Nothing of it is ever rewritten: a data set that grew, shrank,
moved or was labelled anew is another version, which shares parts, and the files of unchanged rows, with those before.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.layout.keys import FORMAT_VERSION, check_format, digest, fingerprint, sealed, unsealed
from pipeline.cache.layout.part import KEY, Part
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder, ShardRecord, selected
from pipeline.cache.layout.snapshot import RecordSnapshot, Summary
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.sources.base import INDEX_SCHEMA
from pipeline.storage.names import folder_name
from pipeline.storage.store import DamagedError, Store, report_damage

SAMPLE_SCHEMA = pa.schema(
    [*INDEX_SCHEMA, pa.field("key", KEY, nullable=False), pa.field("row", pa.int64(), nullable=False)]
)
"""The samples of one part: rows of the source's index, with the image's key and its row in the part, in the order of the rows."""
BAD_SCHEMA = pa.schema([*INDEX_SCHEMA, pa.field("reason", pa.string(), nullable=False), pa.field("read", pa.bool_())])
"""Samples that cannot be used, why, and whether their bytes could be read; if not, they are tried again."""

_PART = re.compile(r"[0-9a-f]{20}")
_SAMPLES = re.compile(r"(rows|bad)-[0-9a-f]{16}\.parquet")

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The samples of a data set in one part.

    Attributes:
        part, images, shard_size: id, number of images and shard size of the part.
        file: name of the file of samples.
        content: sum of the digests of the samples' names, labels and images, 128 bits in hexadecimal digits.
        samples, labelled, bytes: their number, the number of those with a label, and the bytes of their images in the source.
        whole: whether every image of the part is a sample once.
        files: numbers of the files of the data set that hold them.
    """

    part: str
    images: int
    shard_size: int
    file: str
    content: str
    samples: int
    labelled: int
    bytes: int
    whole: bool
    files: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """A version of a data set, seen through a view of its images. Picklable.

    Attributes:
        location: of the source.
        classes: names of the classes by label; may be empty.
        files: files that hold many samples each (tars, Parquet files) with their versions, sorted.
        bad: name of the file of samples that cannot be used; "" if there are none.
        policy: the view whose features teachers compute.
        snapshot: the shard records that the job has read, shared by its data sets.
        draft: the files of a version that is not written yet, by name.
        listed: digest of what a source of single files listed (:class:`~pipeline.sources.listed.Listed`), and the number of its
            rows; "" and 0 for other sources, and where a version does not say.
    """

    cache: Store
    name: str
    location: str
    classes: tuple[str, ...]
    files: tuple[tuple[str, int], ...] = ()
    selections: tuple[Selection, ...] = ()
    bad: str = ""
    policy: ViewPolicy = WHOLE
    snapshot: RecordSnapshot = field(default_factory=RecordSnapshot, repr=False, compare=False)
    draft: Mapping[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)
    listed: tuple[str, int] = field(default=("", 0), compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the samples' names, labels and images, in whatever parts and places they are."""
        total = sum(int(chosen.content, 16) for chosen in self.selections) % 2**128
        return digest([self.count, f"{total:032x}"])

    @cached_property
    def count(self) -> int:
        """Samples that can be used."""
        return sum(chosen.samples for chosen in self.selections)

    @cached_property
    def labelled(self) -> int:
        """Samples with a label."""
        return sum(chosen.labelled for chosen in self.selections)

    @property
    def id(self) -> str:
        """Readable name of this version."""
        return f"{folder_name(self.name)}-{self.fingerprint[:8]}"

    @property
    def store(self) -> Store:
        """Folder of all versions of the data set."""
        return dataset_store(self.cache, self.name)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts that hold its images, in order."""
        return tuple(
            Part(self.cache, chosen.part, chosen.images, chosen.shard_size, self.policy, self.snapshot)
            for chosen in self.selections
        )

    @cached_property
    def shards(self) -> list[tuple[Part, int]]:
        """The shards that hold samples."""
        return [(part, shard) for number, part in enumerate(self.parts) for shard in self.shards_of(number)]

    def shards_of(self, number: int) -> list[int]:
        """Numbers of the shards of part `number` that hold samples."""
        part = self.parts[number]
        if self.selections[number].whole:
            return [*range(part.shards)]
        rows = self.samples(number, ["row"])["row"].to_numpy()
        return [int(shard) for shard in np.unique(rows // part.shard_size)]

    def samples(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The samples in part `number`, or these columns of them (`SAMPLE_SCHEMA`); UserError if the file is damaged."""
        file = self.selections[number].file
        if (table := self.draft.get(file)) is not None:
            return table if columns is None else table.select(columns)
        return read_samples(self.store, file, columns)

    @property
    def sample_files(self) -> list[str]:
        """Names of its files of samples."""
        return [*(chosen.file for chosen in self.selections), *([self.bad] if self.bad else [])]

    def bad_samples(self) -> pa.Table:
        """The samples that cannot be used (`BAD_SCHEMA`)."""
        if self.bad in self.draft or not self.bad:
            return self.draft.get(self.bad, BAD_SCHEMA.empty_table())
        return read_samples(self.store, self.bad)

    def statistics(self, teacher: str) -> Store:
        """Folder of the statistics of a teacher, by its id, over the samples in this view."""
        return self.store.sub(f"statistics/{self.fingerprint[:16]}/{self.policy.id}/{teacher}")

    def missing(self, teacher: str) -> list[tuple[Part, int]]:
        """Shards with samples that a teacher, by its id, lacks, according to the snapshot."""
        return self._missing(lambda part: part.teacher(teacher))

    def missing_images(self) -> list[tuple[Part, int]]:
        """Shards of `images` that are missing, according to the snapshot."""
        return self._missing(lambda part: part.images)

    def missing_crops(self) -> list[tuple[Part, int]]:
        """Row shards of crops that are missing; none for a view without crops."""
        return self._missing(lambda part: part.rows) if self.policy.crops else []

    def _missing(self, folder: Callable[[Part], ShardFolder]) -> list[tuple[Part, int]]:
        found = []
        self.snapshot.read_ahead(map(folder, self.parts))
        for number, part in enumerate(self.parts):
            if lacking := part.missing(folder(part)):
                needed = {*self.shards_of(number)}
                found += [(part, shard) for shard in lacking if shard in needed]
        return found

    def records(self, teacher: str) -> Iterator[tuple[Part, ShardRecord]]:
        """Records of the complete shards of a teacher, by its id, with their parts, from the snapshot."""
        for part in self.parts:
            yield from ((part, record) for record in part.records(part.teacher(teacher)).values())

    def summaries(self, teacher: str) -> list[Summary]:
        """What every part has of a teacher, by its id, from the snapshot."""
        folders = [part.teacher(teacher) for part in self.parts]
        self.snapshot.read_ahead(folders)
        return [*map(self.snapshot.summary, folders)]

    def row_groups(self) -> np.ndarray:
        """The row groups that hold samples, in order, [G, 4] int64: the fields of `RowGroup`, with the samples' views as rows."""
        found = [self._groups(number) for number in range(len(self.selections))]
        return np.concatenate(found) if found else np.empty((0, 4), np.int64)

    def chosen_rows(self, number: int, shard: int) -> np.ndarray | None:
        """Numbers of the rows of a shard of part `number` that are samples, each as often as it is one; None: all, once."""
        chosen, part = self.selections[number], self.parts[number]
        if chosen.whole:
            return None
        rows, first = self.samples(number, ["row"])["row"].to_numpy(), shard * part.shard_size
        chosen_rows: np.ndarray = rows[slice(*np.searchsorted(rows, [first, first + part.shard_rows(shard)]))] - first
        return chosen_rows

    def _groups(self, number: int) -> np.ndarray:
        chosen = self.selections[number]
        starts = np.arange(0, chosen.images, chosen.shard_size)
        sizes = np.minimum(chosen.shard_size, chosen.images - starts)
        counts = -(-sizes // ROW_GROUP_SIZE)
        shards = np.repeat(np.arange(len(starts)), counts)
        groups = np.arange(len(shards)) - np.repeat(counts.cumsum() - counts, counts)
        first = starts[shards] + groups * ROW_GROUP_SIZE
        last = np.minimum(first + ROW_GROUP_SIZE, (starts + sizes)[shards])
        if not chosen.whole:
            first, last = np.searchsorted(self.samples(number, ["row"])["row"].to_numpy(), [first, last])
        found = np.stack(
            [np.full(len(shards), number), shards, groups, (last - first) * self.policy.rows_per_image], axis=1
        )
        return found[found[:, 3] > 0]


def group_rows(part: Part, shard: int, group: int) -> tuple[int, int]:
    """First row in the part of a row group of images, and the row after its last."""
    start = shard * part.shard_size
    first = start + group * ROW_GROUP_SIZE
    return first, min(first + ROW_GROUP_SIZE, start + part.shard_rows(shard))


def read_samples(store: Store, file: str, columns: list[str] | None = None) -> pa.Table:
    """A file of samples, or these columns of it; DamagedError if it is missing or damaged."""
    with report_damage(f"{store.uri}/{file}"):
        table = pq.read_table(store.open(file), columns=columns, page_checksum_verification=True)
        return selected(table, columns)


def dataset_store(cache: Store, name: str) -> Store:
    """Folder of all versions of a data set."""
    return cache.sub(f"datasets/{folder_name(name)}")


@dataclass(frozen=True)
class Version:
    """A version that the cache holds: when it was made, in seconds since 1970, and its content."""

    file: str
    made: float
    dataset: Dataset


def read_versions(cache: Store, name: str, policy: ViewPolicy, snapshot: RecordSnapshot) -> Iterator[Version]:
    """The versions of a data set, the latest first, without damaged ones; UserError for one of another format."""
    for file in version_files(dataset_store(cache, name)):
        try:
            yield read_version(cache, folder_name(name), file, policy, snapshot)
        except DamagedError as error:
            log.warning("%s; images that it alone lists are read again", error)


def version_files(store: Store) -> list[str]:
    """Names of the files of versions in a folder of `datasets`, the latest first."""
    return sorted((file for file in store.files() if file.startswith("version-")), reverse=True)


def read_version(
    cache: Store, folder: str, file: str, policy: ViewPolicy = WHOLE, snapshot: RecordSnapshot | None = None
) -> Version:
    """A version from its file in a folder of `datasets`.

    Raises:
        DamagedError: if it cannot be read.
        UserError: if it is of another format.
    """
    store = cache.sub(f"datasets/{folder}")
    try:
        meta = unsealed(store.get(file))
        check_format(meta, store.uri)
        files = tuple((str(uri), int(version)) for uri, version in meta["files"])
        chosen = tuple(Selection(*item)._replace(files=tuple(item[-1])) for item in meta["selections"])
        content = meta["name"], meta["location"], tuple(meta["classes"]), files, chosen, meta["bad"]
        listed, rows = meta.get("listed", ("", 0))
        dataset = Dataset(cache, *content, policy, snapshot or RecordSnapshot(), listed=(str(listed), int(rows)))
        _check_fields(dataset)
        return Version(file, float(meta["made"]), dataset)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        remedy = f"with the recipe of its data and --verify --repair, or forget it with --delete {folder}/{file}"
        raise DamagedError(f"{store.uri}/{file} cannot be read ({error}): run jobs/precompute.py {remedy}") from error


def _check_fields(dataset: Dataset) -> None:
    """Raise ValueError unless the fields are valid, above all the file names, which must not lead out of the cache."""
    texts = all(isinstance(text, str) for text in (dataset.name, dataset.location, *dataset.classes))
    selections = all(
        _PART.fullmatch(chosen.part)
        and _SAMPLES.fullmatch(chosen.file)
        and min(chosen.images, chosen.shard_size, chosen.samples) > 0
        and all(0 <= number < len(dataset.files) for number in chosen.files)
        for chosen in dataset.selections
    )
    if not (texts and selections and (not dataset.bad or _SAMPLES.fullmatch(dataset.bad))):
        raise ValueError("a field has the wrong type, or names a file that is none of a data set")


def make_dataset(
    empty: Dataset,
    parts: Iterable[Part],
    samples: Mapping[str, pa.Table],
    bad: pa.Table,
    kept: Mapping[str, tuple[Selection, Dataset]] | None = None,
) -> Dataset:
    """A version with these samples, which is not written yet.

    Args:
        empty: with the name, location, classes, files, view and snapshot.
        parts: those that hold the samples, and possibly others.
        samples: by the id of their part, rows of `SAMPLE_SCHEMA`.
        bad: rows of `BAD_SCHEMA`.
        kept: selections of another version that stay as they are, with that version, by the id of their part.
    """
    numbers = {uri: number for number, (uri, _) in enumerate(empty.files)}
    draft: dict[str, pa.Table] = {}
    selections = []
    for part in parts:
        if part.id in samples:
            table = samples[part.id].sort_by([("row", "ascending"), ("sample_id", "ascending")])
            chosen = _selection(part, table, numbers)
            draft[chosen.file] = table
            selections.append(chosen)
        elif kept and part.id in kept:
            chosen, before = kept[part.id]
            uris = (before.files[number][0] for number in chosen.files)
            selections.append(chosen._replace(files=tuple(sorted(numbers[uri] for uri in uris))))
    bad_file = f"bad-{fingerprint(bad)[:16]}.parquet" if bad.num_rows else ""
    if bad_file:
        draft[bad_file] = bad
    return replace(empty, selections=tuple(selections), bad=bad_file, draft=draft)


def _content(samples: pa.Table) -> str:
    """A sum does not depend on how samples are divided into parts, and needs no more than the sums of the parts."""
    rows = zip(*(samples[name].to_pylist() for name in ("sample_id", "label", "key")), strict=True)
    digests = (hashlib.blake2b(f"{row}".encode(), digest_size=16).digest() for row in rows)
    return f"{sum(int.from_bytes(part) for part in digests) % 2**128:032x}"


def _selection(part: Part, table: pa.Table, files: Mapping[str, int]) -> Selection:
    labels, rows = table["label"], table["row"].to_numpy()
    return Selection(
        part.id,
        part.count,
        part.shard_size,
        f"rows-{fingerprint(table)[:16]}.parquet",
        _content(table),
        table.num_rows,
        table.num_rows - labels.null_count,
        int(pc.sum(table["size"]).as_py() or 0),
        bool(np.array_equal(rows, np.arange(part.count))),
        tuple(sorted(files[uri] for uri in pc.unique(table["uri"]).to_pylist() if uri in files)),
    )


def write_dataset(dataset: Dataset, damaged: Collection[str] = ()) -> Dataset:
    """Write a version, after its files, unless the latest version is the same; returns it without its draft.

    Args:
        damaged: files that are written again, if they are those of this version.
    """
    latest = next(read_versions(dataset.cache, dataset.name, dataset.policy, dataset.snapshot), None)
    write_samples(dataset, damaged)
    if latest and latest.dataset == dataset:
        return replace(dataset, draft={})
    made = max(time.time(), latest.made + 1e-3 if latest else 0.0)
    fields = ("name", "location", "count", "fingerprint", "classes", "files", "bad", "selections", "listed")
    meta = {"format": FORMAT_VERSION, **{name: getattr(dataset, name) for name in fields}, "made": made}
    dataset.store.put(f"version-{round(1000 * made):014d}-{dataset.fingerprint[:8]}.json", sealed(meta))
    return replace(dataset, draft={})


def write_samples(dataset: Dataset, damaged: Collection[str] = ()) -> None:
    """Write the files of a version that is not written yet, but those that exist and are not `damaged`."""
    present = dataset.store.files().keys() - damaged if dataset.draft else ()
    for name, table in dataset.draft.items():
        if name not in present:
            sink = pa.BufferOutputStream()
            # Most columns differ in every row: a dictionary would only be added to their values. Nobody reads their statistics.
            options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
            pq.write_table(table, sink, **options, write_page_checksum=True)
            dataset.store.put(name, sink.getvalue())


def record_use(dataset: Dataset, run_id: str) -> None:
    """Note that a run uses this version."""
    dataset.store.sub(f"used/{dataset.fingerprint[:16]}").put(run_id, b"")


def used_by(dataset: Dataset) -> list[str]:
    """Ids of the runs that have used this version, sorted."""
    return sorted(dataset.store.sub(f"used/{dataset.fingerprint[:16]}").files())
