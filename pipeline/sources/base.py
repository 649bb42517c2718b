"""Interface of an image source: an index of samples, and the encoded bytes of any of its rows."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.left_out import with_notes
from pipeline.storage.files import THREADS, Entry, describe

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)
"""One row per sample.

`sample_id` is stable across machines and runs; `label` is null for a sample without one; `uri` is the absolute path or URI
of the file that holds the image ("" for generated scenes); `offset` is the byte offset in a tar, the row in a Parquet file,
the number of a generated scene, else 0; `size` is in bytes: of the encoded image or of a raw array, 0 if unknown; `version`
is that of the file (:class:`~pipeline.storage.files.Entry`), for a generated scene a digest of all that decides its pixels but
its number.
"""

ROWS_HELD = 1 << 16
"""Rows of an index that are objects of Python at a time."""
MAX_BYTES = 256 << 20
"""Maximum size of a file, tar member or array: the largest image that `decode_image` accepts, uncompressed."""


def odd_class(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """How two lists of classes differ: what only the first and only the second has, or their order; None if they are equal."""
    if tuple(expected) == tuple(found):
        return None
    sides = {"the first": sorted({*expected} - {*found}), "the second": sorted({*found} - {*expected})}
    only = [f"only {side} has {', '.join(names[:3])}" + _more(names[3:]) for side, names in sides.items() if names]
    if only:
        return "; ".join(only)
    place = next((place for place, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other), None)
    if place is None:
        return f"{len(expected)} and {len(found)} of the same names, some of them repeated"
    return f"the same names in another order; class {place} is {expected[place]} in the first and {found[place]} in the second"


def _more(names: Sequence[str]) -> str:
    return f" and {len(names)} more" if names else ""


class NoImagesError(UserError):
    """A source lists no image."""


class Source(Protocol):
    """A set of images. Small and picklable, for Ray workers: it holds no open file."""

    @property
    def name(self) -> str:
        """Readable name, safe as a file name, such as `imagenette224-train`."""

    @property
    def location(self) -> str:
        """Absolute path or pattern, URI, or `samples`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty if the source does not have them."""

    @property
    def random_access(self) -> bool:
        """Whether single rows are fast to read; if not, neighbours in the index share a block that is read as a whole."""

    def versions(self) -> dict[str, int]:
        """The versions of the tars or Parquet files by path or URI; empty for images that are files of their own.

        Raises:
            UserError: if a file cannot be found.
        """

    def only(self, files: Sequence[str]) -> "Source":
        """The source of some of those files."""

    def index(self) -> pa.Table:
        """Table of `INDEX_SCHEMA`, sorted by sample id, ids unique, never empty.

        Raises:
            UserError: if nothing is found, an id occurs twice, or a file that the index needs cannot be read.
        """

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """Encoded image bytes of these index rows, in order; an exception instead for each sample that cannot be read.

        Raises:
            StoreError: if the store of the images fails, which says nothing about a sample.
        """


def file_versions(files: Sequence[str]) -> dict[str, int]:
    """The versions of files by path or URI; UserError if one cannot be found."""
    return {entry.path: entry.version for entry in file_entries(files)}


def file_entries(files: Sequence[str]) -> list[Entry]:
    """Sizes and versions of files by path or URI; UserError if one cannot be found."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [*map_ahead(pool, file_entry, files, THREADS)]


def file_entry(file: str) -> Entry:
    """Size and version of a file by path or URI; UserError if it cannot be found."""
    try:
        return describe(file)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be found ({error.strerror or error}); restore it, or name the files anew"
        ) from error


def foreign_name(name: str) -> bytes | None:
    """The bytes of a file name that is not valid UTF-8, which an index cannot hold; None for a valid one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return None


def oversize(size: int) -> ValueError | None:
    """The error for a sample of this many bytes if that is too many, or None."""
    return ValueError(f"{size} bytes are over the {MAX_BYTES} allowed") if size > MAX_BYTES else None


class IndexRow(NamedTuple):
    """A row of `INDEX_SCHEMA`."""

    sample_id: str
    label: int | None
    uri: str
    offset: int
    size: int
    version: int


def make_table(rows: Iterable[IndexRow]) -> pa.Table:
    """A table of these rows, which are not held as objects of Python: a million takes gigabytes."""
    left, tables = iter(rows), [INDEX_SCHEMA.empty_table()]
    while some := list(islice(left, ROWS_HELD)):
        tables.append(pa.table([*zip(*some, strict=True)], schema=INDEX_SCHEMA))
    return pa.concat_tables(tables)


def finish_index(table: pa.Table, *, location: str, looked_for: str, left_out: Sequence[str] = ()) -> pa.Table:
    """Cast to `INDEX_SCHEMA`, sort by sample id and refuse an empty index or repeated ids.

    Negative labels mean "no label", as in Hugging Face test sets, and become null. `left_out` becomes the notes of the index
    (:func:`~pipeline.sources.left_out.notes_of`).

    Raises:
        UserError: if the table has no rows (the message says what was `looked_for` and left out), or a sample id is repeated
            or contains a control character.
    """
    if table.num_rows == 0:
        found = f"; left out: {'; '.join(left_out)}" if left_out else ""
        raise NoImagesError(f"{location}: no images found; looked for {looked_for}{found}")
    label = table["label"].cast(pa.int64())
    label = pc.if_else(pc.less(label, 0), pa.scalar(None, pa.int64()), label)
    table = table.set_column(table.schema.get_field_index("label"), "label", label)
    table = _sorted(table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA))
    ids = table["sample_id"]
    repeated = pc.index(pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)), True).as_py()
    if repeated >= 0:
        files = sorted(set(table["uri"][repeated : repeated + 2].to_pylist()))
        raise UserError(
            f"{location}: sample id '{ids[repeated]}' occurs more than once (in {' and '.join(files)}); "
            "rename or remove one of them"
        )
    # Ids are printed: a line break would forge a log line, an escape sequence would control the terminal.
    for chunk in ids.chunks:
        if _may_have_control_characters(chunk):
            control = pc.index(pc.match_substring_regex(chunk, r"[\x00-\x1f\x7f]"), True).as_py()
            if control >= 0:
                raise UserError(
                    f"{location}: sample id {chunk[control].as_py()!r} contains a control character; rename it"
                )
    return with_notes(table, left_out)


def _may_have_control_characters(strings: pa.Array) -> bool:
    """Whether one of the bytes is one: a look at all bytes takes less time than an expression on all strings."""
    content = np.frombuffer(strings.buffers()[2] or b"", np.uint8)
    return any(((some < 32) | (some == 127)).any() for some in np.array_split(content, 1 + len(content) // ROWS_HELD))


def _sorted(table: pa.Table) -> pa.Table:
    """A table sorted by sample id, column by column: a large index is held once, not thrice."""
    ids = table["sample_id"]
    if pc.all(pc.less_equal(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py():
        return table
    order = pc.sort_indices(table, sort_keys=[("sample_id", "ascending")])
    columns = []
    for name in table.column_names:
        columns.append(table[name].combine_chunks().take(order))
        table = table.drop_columns(name)
    return pa.table(columns, schema=INDEX_SCHEMA)


def by_file(rows: pa.Table) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Runs of neighbouring index rows in the same file: its path, and (offset, size) of each."""
    columns = (rows[name].to_pylist() for name in ("uri", "offset", "size"))
    for uri, run in groupby(zip(*columns, strict=True), key=lambda row: row[0]):
        yield uri, [(offset, size) for _, offset, size in run]


def in_stored_order(
    rows: pa.Table, read: Callable[[pa.Table], Iterator[bytes | Exception]]
) -> Iterator[bytes | Exception]:
    """What `read` gives for index rows sorted by file and offset, in the order of `rows`; kept in memory if that is another."""
    stored = pc.sort_indices(rows, [("uri", "ascending"), ("offset", "ascending")])
    if stored.equals(pa.array(range(len(rows)), stored.type)):
        yield from read(rows)
        return
    images = list(read(rows.take(stored)))
    yield from (images[place] for place in pc.sort_indices(stored).to_pylist())
