"""Sources whose files are archives in a store: each new one is read once, from front to back, and not opened before."""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import pyarrow as pa

from pipeline.sources.base import Source
from pipeline.sources.tar_shards import TarShards
from pipeline.storage.files import Entry

Take = Callable[[int, bytes | Exception], None]
"""Is called with the offset and the encoded bytes of an image, or with why they cannot be used."""


@runtime_checkable
class StreamedSource(Source, Protocol):
    """A source of archives that a reader goes through once, and learns their samples from."""

    def archives(self) -> list[Entry]:
        """The archives with sizes and versions; none is opened.

        Raises:
            UserError: if one cannot be found.
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
    return source if isinstance(source, TarShards) and not source.random_access else None
