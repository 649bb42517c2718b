"""A dataset in the cache: the index of a source, frozen and cut into shards, and the folders below it.

    <cache>/<dataset-id>/
      dataset.json                     name, source, fingerprint, count, classes, shard size
      index.parquet                    the shard index; one row group a shard
      views/full/images/               one shard folder: keys, labels and the source's own encoded bytes
      views/<view>/view.json           the policy: ``full``, or crops
      views/<view>/rows/               one shard folder: keys and geometry of crops (of ``full``, columns of images)
      views/<view>/teachers/<id>/      teacher.json and one shard folder per teacher

`images` keeps the source's bytes as they are, neither resized nor encoded again: teacher and student then decode the
same pixels, every teacher is cut from the original once, and a teacher can be added when the source is gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.layout.keys import FORMAT_VERSION, dataset_id, index_fingerprint
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.sources.base import Source
from pipeline.storage.store import Store, report_damage

SCATTER_BYTES = 1 << 30
"""A source that is only quick to read in its own order is still read in random order up to this size."""


@dataclass(frozen=True)
class Dataset:
    """One dataset of the cache. Picklable.

    Attributes:
        store: its folder.
        name, location, fingerprint: of the source when it was indexed.
        count: samples in the index, before any is quarantined.
        classes: names of the classes by label; may be empty.
        shard_size: samples of a shard; frozen when the dataset was created.
        policy: the view that teachers are asked for.
    """

    store: Store
    name: str
    location: str
    fingerprint: str
    count: int
    classes: tuple[str, ...]
    shard_size: int
    policy: ViewPolicy = WHOLE

    @property
    def id(self) -> str:
        """Name of its folder."""
        return dataset_id(self.name, self.fingerprint)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def shard_rows(self, shard: int) -> int:
        """Samples of a shard in the index."""
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
        """Keys, labels and images, whatever the view."""
        return ShardFolder(self.store.sub(f"views/{WHOLE.id}/images"))

    @property
    def rows(self) -> ShardFolder:
        """Keys and geometry of crops, which every teacher's shards align with."""
        return ShardFolder(self.view.sub("rows"), self._row_group_size)

    def teacher(self, teacher: str) -> ShardFolder:
        """Shards of a teacher, by its id."""
        return ShardFolder(self.view.sub(f"teachers/{teacher}"), self._row_group_size)

    def sample_groups(self, count: int) -> list[tuple[int, int]]:
        """Row groups of about `count` images, spread evenly over the dataset: (shard, number in its file)."""
        records = list(self.images.records().values())
        groups = [(record.shard, group) for record in records for group in range(-(-record.rows // ROW_GROUP_SIZE))]
        wanted = min(len(groups), -(-count // ROW_GROUP_SIZE))
        return [groups[number] for number in np.linspace(0, len(groups) - 1, wanted).round().astype(int)]

    @property
    def _row_group_size(self) -> int:
        return ROW_GROUP_SIZE * self.policy.rows_per_image


def plan_dataset(
    cache: Store, source: Source, name: str, shard_size: int, policy: ViewPolicy
) -> tuple[Dataset, pa.Table]:
    """The dataset that a source would be in this cache, and its index; writes nothing.

    A dataset that is already there keeps its own shard size.

    Args:
        name: readable name of the dataset.
        policy: the view that teachers are asked for.

    Raises:
        UserError: where the source is unusable, or the cache holds this name made for other data.
    """
    index = source.index()
    if source.random_access or pc.sum(index["size"]).as_py() <= SCATTER_BYTES:
        index = _scatter(index)
    fingerprint = index_fingerprint(index)
    dataset = _dataset(cache, name, source.location, fingerprint, index.num_rows, source.classes, shard_size)
    _refuse_other_data(cache, dataset)
    if dataset.store.exists("dataset.json"):
        meta = read_meta(dataset.store)
        dataset = _dataset(
            cache, meta["name"], meta["location"], fingerprint, meta["count"], meta["classes"], meta["shard_size"]
        )
    return replace(dataset, policy=policy), index


def create_dataset(dataset: Dataset, index: pa.Table) -> None:
    """Write the index, the description of a dataset and that of its view, unless they are there."""
    if not dataset.view.exists("view.json"):
        dataset.view.put("view.json", json.dumps(asdict(dataset.policy), indent=2).encode())
    if dataset.store.exists("dataset.json"):
        return
    write_index(dataset, index)
    meta = {"format": FORMAT_VERSION, **{k: v for k, v in asdict(dataset).items() if k not in ("store", "policy")}}
    dataset.store.put("dataset.json", json.dumps(meta, indent=2).encode())


def write_index(dataset: Dataset, index: pa.Table) -> None:
    """Write the index, one row group a shard."""
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink, row_group_size=dataset.shard_size)
    dataset.store.put("index.parquet", sink.getvalue())


def discard_stats(folder: ShardFolder) -> None:
    """Forget the statistics of a teacher's shards, which are merged when all are there."""
    for name in ("stats.npz", "phi_s.npz"):
        folder.store.delete(name)


def _scatter(index: pa.Table) -> pa.Table:
    """Order samples by the hash of their id: every shard and row group is then a random sample of the classes.

    A source lists its classes one after the other; kept in that order, a training window would hold one class.
    """
    hashes = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in index["sample_id"].to_pylist()]
    return index.take(sorted(range(len(hashes)), key=hashes.__getitem__))


def _dataset(
    cache: Store, name: str, location: str, fingerprint: str, count: int, classes: Sequence[str], shard_size: int
) -> Dataset:
    store = cache.sub(dataset_id(name, fingerprint))
    return Dataset(store, name, location, fingerprint, count, tuple(classes), shard_size)


def read_meta(store: Store) -> dict[str, Any]:
    """What dataset.json of a dataset's folder says.

    Raises:
        UserError: where it cannot be read, or is of another cache format.
    """
    try:
        meta: dict[str, Any] = json.loads(store.get("dataset.json"))
        version = meta["format"]
        if version == FORMAT_VERSION and not _is_description(meta):
            raise ValueError("fields are missing or of another type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{store.uri}/dataset.json cannot be read ({error}): restore it, or delete that folder"
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
                f"or set data.name to cache this version under a name of its own, or delete that folder"
            )
