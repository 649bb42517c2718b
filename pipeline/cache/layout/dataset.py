"""A dataset in the cache: the index of a source, frozen and cut into shards, and the folders below it (docs/cache.md).

`images` keeps the source's bytes unchanged, neither resized nor encoded again: teacher and student decode the same pixels,
and a teacher can be added after the source is gone.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.layout.keys import FORMAT_VERSION, dataset_id, index_fingerprint
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, ShardFolder, ShardRecord, evenly_spaced, row_groups
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.sources.base import Source
from pipeline.sources.locations import SAMPLES
from pipeline.storage.store import Store, report_damage

SCATTER_BYTES = 1 << 30
"""Up to this size, a source that reads fast only in its own order is read in random order all the same."""
DESCRIBED = ("name", "location", "fingerprint", "count", "classes", "shard_size")
"""Fields of a dataset that dataset.json keeps."""


@dataclass(frozen=True)
class Dataset:
    """One dataset of the cache. Picklable.

    Attributes:
        name, location, fingerprint: of the source when it was indexed.
        count: samples in the index, quarantined ones included.
        classes: names of the classes by label; may be empty.
        shard_size: samples per shard; fixed when the dataset was created.
        policy: the view whose features teachers compute.
        snapshot: the shard records that the job has read, shared by its datasets.
    """

    store: Store
    name: str
    location: str
    fingerprint: str
    count: int
    classes: tuple[str, ...]
    shard_size: int
    policy: ViewPolicy = WHOLE
    snapshot: RecordSnapshot = field(default_factory=RecordSnapshot, repr=False, compare=False)

    @property
    def id(self) -> str:
        """Name of its folder."""
        return dataset_id(self.name, self.fingerprint)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def shard_rows(self, shard: int) -> int:
        """Samples of a shard according to the index."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def shard_index(self, shard: int) -> pa.Table:
        """The index rows of one shard (`pipeline.sources.base.INDEX_SCHEMA`)."""
        with report_damage(f"{self.store.uri}/index.parquet"):
            return pq.ParquetFile(self.store.open("index.parquet")).read_row_group(shard)

    @property
    def view(self) -> Store:
        """Folder of the view."""
        return self.store.sub(f"views/{self.policy.id}")

    @property
    def images(self) -> ShardFolder:
        """Keys, labels and images, shared by all views."""
        return ShardFolder(self.store.sub(f"views/{WHOLE.id}/images"))

    @property
    def rows(self) -> ShardFolder:
        """Keys and geometry of crops; every teacher's shards have the same rows."""
        return ShardFolder(self.view.sub("rows"), self._row_group_size)

    def teacher(self, teacher: str) -> ShardFolder:
        """Shards of a teacher, by its id."""
        return ShardFolder(self.view.sub(f"teachers/{teacher}"), self._row_group_size)

    def records(self, folder: ShardFolder) -> dict[int, ShardRecord]:
        """Records of the complete shards of one of this dataset's folders, from the snapshot."""
        return self.snapshot.records(folder)

    def missing(self, folder: ShardFolder) -> list[int]:
        """Shards that one of this dataset's folders lacks, according to the snapshot."""
        complete = self.records(folder)
        return [shard for shard in range(self.shards) if shard not in complete]

    def refresh(self, shards: Iterable[int] | None = None) -> None:
        """Read the records of these shards (None: of all) again, in every folder that the snapshot holds."""
        self.snapshot.refresh(self.store.uri, shards)

    def sample_images(self, count: int) -> list[RowGroup]:
        """Row groups of about `count` images, evenly spaced over the dataset."""
        return evenly_spaced(row_groups(self.records(self.images).values()), -(-count // ROW_GROUP_SIZE))

    @property
    def _row_group_size(self) -> int:
        return ROW_GROUP_SIZE * self.policy.rows_per_image


def plan_dataset(
    cache: Store, source: Source, name: str, shard_size: int, policy: ViewPolicy, snapshot: RecordSnapshot | None = None
) -> tuple[Dataset, pa.Table]:
    """The dataset of a source in this cache, existing or to be created, and the source's index; writes nothing.

    An existing dataset keeps its own shard size.

    Raises:
        UserError: if the source is unusable, or the cache holds other data under this name.
    """
    index = source.index()
    if source.random_access or pc.sum(index["size"]).as_py() <= SCATTER_BYTES:
        index = _scatter(index)
    fingerprint = index_fingerprint(index)
    store = cache.sub(dataset_id(name, fingerprint))
    content = source.location, fingerprint, index.num_rows, tuple(source.classes)
    dataset = Dataset(store, name, *content, shard_size, policy, snapshot or RecordSnapshot())
    _refuse_other_data(cache, dataset)
    if store.exists("dataset.json"):
        known = {key: value for key, value in read_meta(store).items() if key in DESCRIBED and key != "fingerprint"}
        dataset = replace(dataset, **{**known, "classes": tuple(known["classes"])})
    return dataset, index


def create_dataset(dataset: Dataset, index: pa.Table) -> None:
    """Write the index and the descriptions of the dataset and its view, unless they exist.

    An index whose files have moved or changed is written again, with the same images in the same order.
    """
    if not dataset.view.exists("view.json"):
        dataset.view.put("view.json", json.dumps(asdict(dataset.policy), indent=2).encode())
    if dataset.store.exists("dataset.json"):
        if len(changed_rows(dataset, index)):
            write_index(dataset, index)
        return
    write_index(dataset, index)
    meta = {"format": FORMAT_VERSION, **{name: getattr(dataset, name) for name in DESCRIBED}}
    dataset.store.put("dataset.json", json.dumps(meta, indent=2).encode())


def changed_rows(dataset: Dataset, index: pa.Table) -> np.ndarray:
    """Numbers of the rows of an index whose files have another place or version than the index in the cache says.

    None if the cache has no index that can be read; all if an older version made it, without versions of files. Generated
    scenes have no files.
    """
    none = np.empty(0, np.int64)
    if dataset.location == SAMPLES or not dataset.store.exists("index.parquet"):
        return none
    try:
        file = pq.ParquetFile(dataset.store.open("index.parquet"))
        known = file.read([name for name in ("uri", "version") if name in file.schema_arrow.names])
    except (pa.ArrowException, OSError):
        return none  # --verify says so, and --repair writes it again
    if "version" not in known.column_names or known.num_rows != index.num_rows:
        return np.arange(index.num_rows)
    differs = pc.or_(*(pc.not_equal(known[name], index[name]) for name in ("uri", "version")))
    return np.flatnonzero(differs.to_numpy())


def write_index(dataset: Dataset, index: pa.Table) -> None:
    """Write the index, one row group per shard."""
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink, row_group_size=dataset.shard_size)
    dataset.store.put("index.parquet", sink.getvalue())


def discard_stats(folder: ShardFolder) -> None:
    """Delete the merged statistics of a teacher's shards, and PHI-S; both are computed again once all shards exist."""
    for name in ("stats.npz", "phi_s.npz"):
        folder.store.delete(name)


def _scatter(index: pa.Table) -> pa.Table:
    """Order samples by the hash of their id: every shard and row group is then a random sample of the classes.

    A source lists one class after the other: in that order, a window of the training shuffle would hold a single class.
    """
    hashes = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in index["sample_id"].to_pylist()]
    return index.take(sorted(range(len(hashes)), key=hashes.__getitem__))


def read_meta(store: Store) -> dict[str, Any]:
    """The content of a dataset folder's dataset.json; UserError if it cannot be read or has another cache format."""
    try:
        meta: dict[str, Any] = json.loads(store.get("dataset.json"))
        version = meta["format"]
        if version == FORMAT_VERSION and not _is_description(meta):
            raise ValueError("fields are missing or have the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{store.uri}/dataset.json cannot be read ({error}): restore it, or delete its folder"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{store.uri} has cache format {version}, this version reads {FORMAT_VERSION}: name another cache.uri"
        )
    return meta


def _is_description(meta: dict[str, Any]) -> bool:
    texts, counts, classes = ("name", "location", "fingerprint"), ("count", "shard_size"), meta.get("classes")
    return (
        all(isinstance(meta.get(key), str) for key in texts)
        and all(isinstance(meta.get(key), int) and meta[key] > 0 for key in counts)
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
    )


def _refuse_other_data(cache: Store, dataset: Dataset) -> None:
    for folder in cache.folders():
        store = cache.sub(folder)
        if not folder.startswith(dataset.id.rsplit("-", 1)[0]) or not store.exists("dataset.json"):
            continue
        meta = read_meta(store)
        if meta["name"] == dataset.name and meta["fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"cache {store.uri} was made for other data: {meta['count']} images of {meta['location']}, "
                f"{dataset.location} now gives {dataset.count} with other names, sizes or labels; restore them, "
                f"set data.name to cache the new version under its own name, or delete that folder"
            )
