"""Sources whose files are archives in a store: each new one is read once, from front to back, and not opened before."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import pyarrow as pa

from pipeline.sources.base import Source
from pipeline.sources.hold_out import HoldOut
from pipeline.sources.parquet_images import ParquetImages
from pipeline.sources.tar_shards import TarShards
from pipeline.storage.files import Entry
from pipeline.storage.remote import is_uri

Take = Callable[[int, bytes | Exception], None]
"""Is called with the offset and the encoded bytes of an image, or with why they cannot be used."""


class StreamedSource(Source, Protocol):
    """A source of archives that a reader goes through once, and learns their samples from."""

    @property
    def identity(self) -> str:
        """What decides, beside the bytes of an archive, which samples it holds."""

    @property
    def may_have_labels(self) -> bool:
        """Whether a sample may have a label."""

    def archives(self) -> list[Entry]:
        """The archives with sizes and versions; none is opened.

        Raises:
            UserError: if one cannot be found.
        """

    def count(self, archives: Sequence[str]) -> tuple[int, int] | None:
        """Rows and at most the bytes of the images of archives, if that is known without reading them.

        Raises:
            UserError: if one is seen to be no archive of this source.
        """

    def prepared(self, archives: Sequence[str]) -> "StreamedSource":
        """The source once it knows what has to be known of all new archives before the first of them is streamed.

        Raises:
            UserError: if one cannot be read.
        """

    def stream(self, archive: str, take: Take) -> tuple[pa.Table, str]:
        """Read an archive from front to back, and hand over every image that may be a sample's, in the order of the archive.

        Returns:
            The rows of `INDEX_SCHEMA`, known in full only at the end, since a label may follow its image; and what the archive
            holds besides, for `notes`.

        Raises:
            UserError: if the archive cannot be read to its end, or a sample in it is ambiguous.
        """

    def notes(self, passed_over: Iterable[str]) -> list[str]:
        """What archives hold besides samples, in phrases over all of them, from what `stream` has returned."""


def streamed(source: Source) -> StreamedSource | None:
    """The source as one of archives that are read once, front to back; None: its index is had without reading its images."""
    if isinstance(source, HoldOut):
        return source if streamed(source.whole) else None
    if isinstance(source, TarShards):
        return source if is_uri(source.shards[0]) else None
    if isinstance(source, ParquetImages):
        return source if is_uri(source.files[0]) else None
    return None
