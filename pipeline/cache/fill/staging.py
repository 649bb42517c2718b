"""The images of an archive between its one reading, front to back, and the shards that keep them (docs/cache.md).

Pieces hold encoded images one after the other, so that a shard, whose images come in the order of their keys, reads just its
own. A file of samples says what each is called and where it lies, and the seal, written last, names all files. Whatever is
missing or damaged here is read from the archive again: every image is compared with its key, Parquet pages and the seal carry
checksums.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.fill.digest import KEYED_SCHEMA, unreadable, with_reasons
from pipeline.cache.layout.dataset import BAD_SCHEMA
from pipeline.cache.layout.keys import FORMAT_VERSION, check_format, digest, sealed, unsealed
from pipeline.cache.layout.part import image_key
from pipeline.errors import UserError
from pipeline.runtime import logs
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import file_entry
from pipeline.sources.streamed import StreamedSource
from pipeline.storage.files import THREADS, Entry
from pipeline.storage.remote import StoreError
from pipeline.storage.store import Store

PIECE_BYTES = 64 << 20
"""Bytes of images at which a piece is written: what a reader of an archive holds, and one request to a store."""
STAGED_SCHEMA = pa.schema(
    [
        *KEYED_SCHEMA,
        pa.field("piece", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)
"""Samples with their keys, and where their images lie: path of the piece below the cache, first byte, and bytes."""
PLACES_SCHEMA = pa.schema([STAGED_SCHEMA.field(name) for name in ("key", "piece", "start", "length")])
"""Where images lie."""
_SEAL = "archive.json"

log = logging.getLogger(__name__)


def staging_folder(cache: Store) -> Store:
    """Folder of all that is staged."""
    return cache.sub("staging")


@dataclass(frozen=True)
class Staged:
    """What an archive holds: samples (`STAGED_SCHEMA`), bad ones (`BAD_SCHEMA`), and what `StreamedSource.notes` takes."""

    samples: pa.Table
    bad: pa.Table
    passed_over: str


@dataclass(frozen=True)
class Staging:
    """The folder of an archive of a source (`identity`: of :class:`StreamedSource`). Picklable."""

    cache: Store
    archive: Entry
    identity: str

    @property
    def store(self) -> Store:
        """Its folder; another version of the archive, or another identity of the source, has another."""
        about = [self.archive.path, self.archive.size, self.archive.version, self.identity]
        return staging_folder(self.cache).sub(digest(about)[:20])

    def read(self) -> Staged | None:
        """What is staged; None if it is incomplete, or, with a warning, damaged: then the archive has to be read again.

        Raises:
            UserError: if another version of this software has written it.
        """
        try:
            meta = unsealed(self.store.get(_SEAL))
            check_format(meta, self.store.uri)
            samples = self._table(meta["samples"], STAGED_SCHEMA)
            return Staged(samples, self._table(meta["bad"], BAD_SCHEMA), str(meta["passed_over"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s): %s is read again", self.store.uri, error, self.archive.path)
            return None

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        return pq.read_table(self.store.open(name), schema=schema, page_checksum_verification=True)

    def write(self, source: StreamedSource) -> None:
        """Read the archive and stage its images.

        Raises:
            UserError: if the archive cannot be read, or is another than was listed, or the cache refuses the write.
        """
        self._check_version()
        pieces = _Pieces(self.store)
        index, passed_over = source.stream(self.archive.path, pieces.take)
        pieces.flush()
        self._check_version()
        samples, bad = pieces.tables(index)
        names = {name: self._put_table(name, table) for name, table in (("samples", samples), ("bad", bad))}
        about = {"uri": self.archive.path, "version": self.archive.version, "passed_over": passed_over}
        self.store.put(_SEAL, sealed({"format": FORMAT_VERSION, **about, **names}))

    def _check_version(self) -> None:
        now = file_entry(self.archive.path)
        if (now.size, now.version) != (self.archive.size, self.archive.version):
            raise UserError(f"{self.archive.path} has changed since it was listed: run the same command again")

    def _put_table(self, name: str, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue()
        file = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        self.store.put(file, data)
        return file

    def drop_images(self) -> None:
        """Delete the images, which shards hold now; the samples stay until a version lists them."""
        for name in self.store.files():
            if name.startswith("images-"):
                self.store.delete(name)

    def delete(self) -> None:
        """Delete everything of the archive, which a version lists now."""
        self.store.delete(_SEAL)
        self.store.delete_folder()


@dataclass
class _Pieces:
    """Collects images, and writes them in pieces.

    Attributes:
        found: by the offset of an image in the archive its key, piece, start and length, or why it cannot be used and whether
            its bytes could be read.
    """

    store: Store
    names: list[str] = field(default_factory=list)
    found: dict[int, tuple[bytes, int, int, int] | tuple[str, bool]] = field(default_factory=dict)
    held: bytearray = field(default_factory=bytearray)

    def take(self, offset: int, data: bytes | Exception) -> None:
        """Add an image."""
        if reason := unreadable(data):
            self.found[offset] = reason, not isinstance(data, Exception)
            return
        assert isinstance(data, bytes)
        self.found[offset] = image_key(data), len(self.names), len(self.held), len(data)
        self.held += data
        if len(self.held) >= PIECE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self.held:
            data, self.held = pa.py_buffer(self.held), bytearray()
            name = f"images-{len(self.names):05d}-{hashlib.sha256(data).hexdigest()[:16]}"
            self.store.put(name, data)
            self.names.append(name)

    def tables(self, index: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows of an index whose images can be used, with their places, and the others."""
        found = [self.found[offset] for offset in index["offset"].to_pylist()]
        good = pa.array([len(item) == 4 for item in found], pa.bool_())
        images, bad = index.filter(good), index.filter(pc.invert(good))
        folder = "/".join(self.store.uri.split("/")[-2:])
        places = [item for item in found if len(item) == 4]
        columns = {
            "key": [key for key, *_ in places],
            "piece": [f"{folder}/{self.names[piece]}" for _, piece, *_ in places],
            "start": [start for *_, start, _ in places],
            "length": [length for *_, length in places],
        }
        reasons = [item for item in found if len(item) == 2]
        for name, values in columns.items():
            images = images.append_column(STAGED_SCHEMA.field(name), pa.array(values, STAGED_SCHEMA.field(name).type))
        return images.cast(STAGED_SCHEMA), with_reasons(bad, reasons)


@dataclass(frozen=True)
class Stage:
    """Stages an archive, unless that has been done. A Ray Data row is an archive.

    Attributes:
        sources: by split.
    """

    cache: Store
    sources: Mapping[str, StreamedSource]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Stage the archive `row["archive"]` (JSON of an `Entry`) of `row["split"]`.

        Returns:
            The row with ``error`` (a user-fixable failure in one line, or "") and ``lost``, whether that is the store's and not
            the archive's.
        """
        source = self.sources[row["split"]]
        staging = Staging(self.cache, Entry(*json.loads(row["archive"])), source.identity)
        try:
            with logs.shard_context(row, "read"):
                if staging.read() is None:
                    staging.write(source)
        except UserError as error:
            return {**row, "error": str(error), "lost": isinstance(error, StoreError)}
        return {**row, "error": "", "lost": False}


def stage_row(split: str, number: int, archive: Entry) -> dict[str, Any]:
    """The row for `Stage` of an archive."""
    return {"split": split, "shard": number, "archive": json.dumps(archive)}


def read_staged(cache: Store, places: pa.Table) -> Iterator[tuple[bytes, bytes]]:
    """Keys and bytes of staged images (`PLACES_SCHEMA`), in any order, without those that are missing or damaged."""
    pieces = [(name, places.filter(pc.equal(places["piece"], name))) for name in pc.unique(places["piece"]).to_pylist()]
    with ThreadPoolExecutor(THREADS) as pool:
        for images in map_ahead(pool, lambda item: _read_piece(cache, *item), pieces, THREADS):
            yield from images


def _read_piece(cache: Store, piece: str, places: pa.Table) -> list[tuple[bytes, bytes]]:
    found = []
    try:
        with cache.open(piece) as file:
            for row in places.sort_by("start").to_pylist():
                file.seek(row["start"])
                data = file.read(row["length"])
                if image_key(data) == row["key"]:
                    found.append((row["key"], data))
    except (FileNotFoundError, pa.ArrowException, OSError):
        pass  # its images are read from the archive
    return found
