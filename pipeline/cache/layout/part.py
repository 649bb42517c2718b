"""A part of the cache: an immutable, ordered list of images that came together, and the folders below it (docs/cache.md).

An image is its bytes: its key is a digest of them, and what is computed of it belongs to the key. Names and labels belong to the
data sets that contain the image (`pipeline/cache/layout/dataset.py`). `images` keeps the source's bytes unchanged, neither
resized nor encoded again: teacher and student decode the same pixels, and a teacher can be added after the source is gone.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.keys import FORMAT_VERSION, check_format, sealed, unsealed
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, ShardFolder, ShardRecord
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.storage.store import Store, report_damage

KEY = pa.binary(16)
"""Type of an image's key."""
PART_SCHEMA = pa.schema([pa.field("key", KEY, nullable=False), pa.field("size", pa.int64(), nullable=False)])
"""Rows of a part's index: key and bytes of every image, in the order of its shards."""


def image_key(data: bytes) -> bytes:
    """The key of an image: BLAKE2b of its encoded bytes, 128 bits."""
    return hashlib.blake2b(data, digest_size=16).digest()


def part_id(index: pa.Table) -> str:
    """Name of the part with this index: a digest of its keys in order."""
    return hashlib.blake2b(b"".join(index["key"].to_pylist()), digest_size=10).hexdigest()


@dataclass(frozen=True)
class Part:
    """A part, seen through a view of its images. Picklable.

    Attributes:
        cache: the store of the cache.
        id: name of its folder.
        count: images.
        shard_size: images per shard; fixed when the part was made.
        policy: the view whose features teachers compute.
        snapshot: the shard records that the job has read.
    """

    cache: Store
    id: str
    count: int
    shard_size: int
    policy: ViewPolicy = WHOLE
    snapshot: RecordSnapshot = field(default_factory=RecordSnapshot, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Names the part and the view, in a job."""
        return f"{self.id}/{self.policy.id}"

    @property
    def store(self) -> Store:
        """Its folder."""
        return self.cache.sub(f"parts/{self.id}")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def shard_rows(self, shard: int) -> int:
        """Images of a shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def index(self) -> pa.Table:
        """Key and size of every image (`PART_SCHEMA`); UserError if the file is missing or damaged."""
        with report_damage(f"{self.store.uri}/index.parquet"):
            return pq.read_table(self.store.open("index.parquet"), schema=PART_SCHEMA, page_checksum_verification=True)

    @property
    def view(self) -> Store:
        """Folder of the view."""
        return self.store.sub(f"views/{self.policy.id}")

    @property
    def images(self) -> ShardFolder:
        """Keys and images, shared by all views."""
        return ShardFolder(self.store.sub(f"views/{WHOLE.id}/images"))

    @property
    def rows(self) -> ShardFolder:
        """Keys and geometry of crops; every teacher's shards have the same rows."""
        return ShardFolder(self.view.sub("rows"), self._row_group_size)

    def teacher(self, teacher: str) -> ShardFolder:
        """Shards of a teacher, by its id."""
        return ShardFolder(
            self.view.sub(f"teachers/{teacher}"), self._row_group_size, teacher_home(self.cache, teacher)
        )

    def records(self, folder: ShardFolder) -> dict[int, ShardRecord]:
        """Records of the complete shards of one of this part's folders, from the snapshot."""
        return self.snapshot.records(folder)

    def missing(self, folder: ShardFolder) -> list[int]:
        """Shards that one of this part's folders lacks, according to the snapshot."""
        complete = self.snapshot.summary(folder).shards
        return [shard for shard in range(self.shards) if shard not in complete] if len(complete) < self.shards else []

    def refresh(self) -> None:
        """Let the snapshot read the records of this part again."""
        self.snapshot.refresh(self.store.uri)

    def write_records(self, folders: Iterable[ShardFolder]) -> None:
        """Write the records of those of this part's folders together that have all shards, and the statistics likewise."""
        for folder in folders:
            if self.shards > 1 and not self.missing(folder):
                folder.write_together(self.records(folder))
                self.merge_statistics(folder)

    def merge_statistics(self, folder: ShardFolder) -> None:
        """Merge the statistics of the shards of a teacher's folder, if it has several and lacks none."""
        if self.shards > 1 and not self.missing(folder):
            folder.merge_statistics(self.records(folder))

    @property
    def _row_group_size(self) -> int:
        return ROW_GROUP_SIZE * self.policy.rows_per_image


def image_groups(parts: Sequence[Part]) -> list[RowGroup]:
    """The row groups of the images of these parts, in order."""
    return [
        RowGroup(number, shard, group, min(ROW_GROUP_SIZE, part.shard_rows(shard) - first))
        for number, part in enumerate(parts)
        for shard in range(part.shards)
        for group, first in enumerate(range(0, part.shard_rows(shard), ROW_GROUP_SIZE))
    ]


def teacher_home(cache: Store, teacher: str) -> Store:
    """Folder of what all features of a teacher share: its description and its projections."""
    return cache.sub(f"teachers/{teacher}")


def write_part(part: Part, index: pa.Table) -> None:
    """Write the index and the description of a part, unless they exist."""
    if part.store.exists("part.json"):
        return
    write_index(part, index)
    describe_part(part)


def describe_part(part: Part) -> None:
    """Write the description of a part."""
    part.store.put("part.json", sealed({"format": FORMAT_VERSION, "count": part.count, "shard_size": part.shard_size}))


def write_index(part: Part, index: pa.Table) -> None:
    """Write the index of a part."""
    sink, table = pa.BufferOutputStream(), index.select(PART_SCHEMA.names).cast(PART_SCHEMA)
    pq.write_table(table, sink, use_dictionary=False, write_page_checksum=True)
    part.store.put("index.parquet", sink.getvalue())


def read_part(cache: Store, name: str) -> Part | None:
    """The part in a folder of `parts`; None if its description is missing. UserError if that cannot be read."""
    store = cache.sub(f"parts/{name}")
    try:
        meta = unsealed(store.get("part.json"))
        check_format(meta, store.uri)
        count, shard_size = meta["count"], meta["shard_size"]
        if not all(type(value) is int and value > 0 for value in (count, shard_size)):
            raise ValueError("fields are missing or have the wrong type")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{store.uri}/part.json cannot be read ({error}): run jobs/precompute.py with the recipe of its images and "
            "--repair, or delete its folder"
        ) from error
    return Part(cache, name, count, shard_size)
