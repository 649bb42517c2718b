"""Images in tar files in the WebDataset layout: members with the same path up to the name's first dot are one sample."""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.runtime.prefetch import map_ahead
from pipeline.sources.base import (
    IndexRow,
    NoImagesError,
    by_file,
    file_entries,
    file_versions,
    finish_index,
    foreign_name,
    in_stored_order,
    make_table,
    oversize,
)
from pipeline.sources.left_out import SHOWN, LeftOut, is_system, some
from pipeline.sources.locations import readable_name
from pipeline.sources.tar_labels import JSON_EXTENSIONS, TEXT_EXTENSIONS, parse_label
from pipeline.storage.files import Entry, describe, open_binary
from pipeline.storage.remote import is_uri
from pipeline.storage.remote_file import read_extents

_KEY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]+)")
_MAX_TEXT = 1 << 20
"""Maximum bytes of a label member or an extended header, which are read as a whole."""
_STREAMS = 4
"""Tars of a store that are indexed at the same time, each from front to back."""


@dataclass(frozen=True)
class TarShards:
    """Uncompressed tar files; `shards` are their absolute paths or URIs.

    A sample id is `<tar file name>/<key>`; the members of a key may be anywhere in the tar. `pipeline.sources.tar_labels` says
    which members hold a label. The layout has no class names.
    """

    location: str
    shards: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last two components of the location, without `.tar`."""
        return readable_name(self.location)

    @property
    def random_access(self) -> bool:
        """Whether the tars are local: a store is fast to read in the order of its files."""
        return not is_uri(self.shards[0])

    def versions(self) -> dict[str, int]:
        """The versions of the files."""
        return file_versions(self.shards)

    def only(self, files: Sequence[str]) -> "TarShards":
        """The source of some of the files."""
        return replace(self, shards=tuple(files))

    def index(self) -> pa.Table:
        """One row per sample with an image; `offset` and `size` locate the image's bytes in the tar.

        A tar of a store is read once, from front to back. The index's notes count the members that are not used.
        """
        unused, tables = _Unused(), []
        for found, passed_over in self._indices():
            tables.append(make_table(found))
            unused.add(passed_over)
        return self._finished(pa.concat_tables(tables), unused)

    def _finished(self, table: pa.Table, unused: "_Unused") -> pa.Table:
        looked_for = f"{', '.join(IMAGE_EXTENSIONS)} members"
        return finish_index(table, location=self.location, looked_for=looked_for, left_out=unused.all_notes())

    @property
    def identity(self) -> str:
        """Nothing decides but the bytes of a tar."""
        return ""

    @property
    def may_have_labels(self) -> bool:
        """Their members tell."""
        return True

    def archives(self) -> list[Entry]:
        """The files with sizes and versions."""
        return file_entries(self.shards)

    def count(self, archives: Sequence[str]) -> tuple[int, int] | None:
        """A tar has no table of contents."""
        return None

    def prepared(self, archives: Sequence[str]) -> "TarShards":
        """This source."""
        return self

    def stream(self, archive: str, take: Callable[[int, bytes | Exception], None]) -> tuple[pa.Table, str]:
        """See :class:`~pipeline.sources.streamed.StreamedSource`; of a sample with several images, all are handed over."""
        rows, unused = _index_tar(archive, take)
        try:
            table = self._finished(make_table(rows), unused)
        except NoImagesError:  # other tars may have some
            table = make_table(())
        return table.replace_schema_metadata(), unused.dump()

    def notes(self, passed_over: Iterable[str]) -> list[str]:
        """What tars hold besides samples, in phrases."""
        unused = _Unused()
        for found in passed_over:
            unused.add(_Unused.load(found))
        return unused.all_notes()

    def _indices(self) -> Iterator[tuple[list[IndexRow], "_Unused"]]:
        if self.random_access:
            yield from map(_index_tar, self.shards)
            return
        with ThreadPoolExecutor(_STREAMS) as pool:
            yield from map_ahead(pool, _index_tar, self.shards, _STREAMS)

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """Bytes of these index rows; an OSError instead for each row that cannot be read."""
        if self.random_access:
            for shard, extents in by_file(rows):
                yield from _read_shard(shard, extents)
        else:
            yield from in_stored_order(rows, _read_remote)


def _read_shard(shard: str, extents: list[tuple[int, int]]) -> Iterator[bytes | Exception]:
    try:
        file = open(shard, "rb")  # noqa: SIM115  (a `with` inside `try` would also catch an OSError of the consumer)
    except OSError as error:
        yield from [error] * len(extents)
        return
    with file:
        for offset, size in extents:
            yield oversize(size) or _read_extent(file, offset, size)


def _read_extent(file: BinaryIO, offset: int, size: int) -> bytes | Exception:
    try:
        file.seek(offset)
        return _whole(file.read(size), file.name, offset, size)
    except OSError as error:
        return error


def _read_remote(rows: pa.Table) -> Iterator[bytes | Exception]:
    """Bytes of rows in ascending order."""
    for shard, extents in by_file(rows):
        done = 0
        found = read_extents(shard, [(offset, size) for offset, size in extents if not oversize(size)])
        try:
            for offset, size in extents:
                yield oversize(size) or _whole(next(found), shard, offset, size)
                done += 1
        except FileNotFoundError as error:
            yield from [error] * (len(extents) - done)


def _whole(data: bytes, shard: str, offset: int, size: int) -> bytes | Exception:
    if len(data) < size:
        return OSError(f"{shard}: ends after {len(data)} of {size} bytes at offset {offset}")
    return data


@dataclass
class Sample:
    """The members of one key by extension in lower case, and what those hold that may be its label.

    Attributes:
        labels: what :func:`~pipeline.sources.tar_labels.parse_label` returns or raises.
    """

    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    labels: dict[str, tuple[int | None, str] | ValueError] = field(default_factory=dict)


@dataclass
class _Unused:
    """Members of tars that are not used.

    Attributes:
        other: neither image nor label.
        alone: number of samples with a label and without an image.
        first_alone: ids of the first of them.
        further: extensions of images of a sample that has another.
        fields: fields of JSON members that look like a label and hold no number.
    """

    other: LeftOut = field(default_factory=lambda: LeftOut("members"))
    alone: int = 0
    first_alone: list[str] = field(default_factory=list)
    further: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)

    def add(self, other: "_Unused") -> None:
        """Count those of another tar too."""
        self.other.endings.update(other.other.endings)
        self.alone += other.alone
        self.first_alone = [*self.first_alone, *other.first_alone][:SHOWN]
        self.further.update(other.further)
        self.fields.update(other.fields)

    def all_notes(self) -> list[str]:
        """One phrase for each kind."""
        kinds = [f"{extension} {count}" for extension, count in self.further.items()]
        odd = [f"{name} in {count} members" for name, count in self.fields.items()]
        notes = {
            f"{self.alone} labels without an image: {some(self.first_alone, self.alone)}": self.alone,
            f"{self.further.total()} images of samples that have another: {some(kinds)}": kinds,
            f"JSON fields that hold no class number: {some(odd)}": odd,
        }
        return [*(note for note, found in notes.items() if found), *self.other.all_notes()]

    def dump(self) -> str:
        """All fields as JSON."""
        return json.dumps([self.other.endings, self.alone, self.first_alone, self.further, self.fields])

    @classmethod
    def load(cls, text: str) -> "_Unused":
        """The inverse of `dump`."""
        endings, alone, first_alone, further, fields = json.loads(text)
        other = LeftOut("members", Counter(endings))
        return cls(other, alone, first_alone, Counter(further), Counter(fields))


def _index_tar(
    path: str, take: Callable[[int, bytes | Exception], None] | None = None
) -> tuple[list[IndexRow], _Unused]:
    """The samples with an image, in the order of their first members, and what is not used.

    Args:
        take: gets offset and bytes of every image, as the tar goes by.
    """
    rows: list[IndexRow] = []
    unused = _Unused()
    try:
        version = describe(path).version
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
            for key, sample in _samples(tar, take).items():
                sample_id = f"{os.path.basename(path)}/{key.removeprefix('./')}"
                images = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
                unused.further.update(images[1:])
                unused.other.endings.update(sample.members.keys() - {*images, *TEXT_EXTENSIONS, *JSON_EXTENSIONS})
                if images:
                    image = sample.members[images[0]]
                    label = _label(sample, unused)
                    rows.append(IndexRow(sample_id, label, path, image.offset_data, image.size, version))
                else:
                    _refuse_dotted(sample)
                    if sample.labels:
                        unused.alone += 1
                        unused.first_alone += [sample_id][: SHOWN - len(unused.first_alone)]
            _refuse_missing_end(tar)
    except (tarfile.TarError, OSError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: truncated, compressed or not a tar file ({error}); fetch it again, or unpack .gz files first"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct or remove that member") from error
    return rows, unused


def _samples(tar: tarfile.TarFile, take: Callable[[int, bytes | Exception], None] | None) -> dict[str, Sample]:
    """The members of every key by extension; a member that occurs twice is refused, since one of the two would be lost."""
    samples: dict[str, Sample] = {}
    for member in _advancing(tar):
        if match := _match(member):
            sample, extension = samples.setdefault(match[1], Sample()), match[2].lower()
            if (known := sample.members.get(extension)) is not None:
                if known.name == member.name:
                    raise ValueError(f"member '{member.name}' occurs twice")
                raise ValueError(f"members '{known.name}' and '{member.name}' differ only in upper and lower case")
            sample.members[extension] = member
            if extension in (*TEXT_EXTENSIONS, *JSON_EXTENSIONS):
                sample.labels[extension] = _parsed(tar, member, extension)
            elif take is not None and extension in IMAGE_EXTENSIONS:
                take(member.offset_data, oversize(member.size) or _content(tar, member))
    return samples


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member, which `TarShards.read` gives too; nothing before them is asked for again."""
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data)
    data = tar.fileobj.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError(f"ends within member '{member.name}'")
    return data


def _parsed(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> tuple[int | None, str] | ValueError:
    """The label in a member, read as the tar goes by; an error counts only if that label is used."""
    if member.size > _MAX_TEXT:
        return ValueError(f"the label in member '{member.name}' takes {member.size} bytes")
    file = tar.extractfile(member)
    try:
        return parse_label(file.read(), extension) if file else (None, "")
    except (ValueError, RecursionError) as error:
        return ValueError(f"the label in member '{member.name}' is not a class number ({error})")


def _refuse_dotted(sample: Sample) -> None:
    """Refuse names such as `a.b.jpg`: WebDataset takes all after the first dot as the extension, and would lose the image."""
    for extension, member in sample.members.items():
        if extension.endswith(IMAGE_EXTENSIONS):
            raise ValueError(f"member '{member.name}' is not an image, because its extension starts at the first dot")


class _Member(tarfile.TarInfo):
    """Refuses negative sizes, and extended headers so large that reading one would exhaust memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile's hook for subclasses. Versions before the fix of CVE-2025-8194 loop forever on a negative size.
        if self.size < 0 or (self.size > _MAX_TEXT and self.type in _EXTENDED):
            raise tarfile.ReadError(f"a header claims that {self.size} bytes follow")
        return super()._proc_member(tar)  # type: ignore[misc]


_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _advancing(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members; refuses one that claims to end before it starts, which tarfile would return forever."""
    for member in tar:
        if member.size < 0 or tar.offset <= member.offset:
            raise tarfile.ReadError(f"member '{member.name}' claims a size of {member.size} bytes")
        yield member


def _match(member: tarfile.TarInfo) -> re.Match[str] | None:
    """Key and extension of a file; None for other members, and for those that systems add."""
    match = _KEY.fullmatch(member.name) if member.isreg() else None
    if match is None or any(map(is_system, member.name.split("/"))):
        return None
    if name := foreign_name(match[0]):
        raise ValueError(f"the name of member {name!r} is not valid UTF-8")
    return match


def _refuse_missing_end(tar: tarfile.TarFile) -> None:
    # tarfile treats a damaged or truncated header as the end of the archive; the real end is a block of zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end marker at byte {tar.offset}")


def _label(sample: Sample, unused: _Unused) -> int | None:
    """The label in the first member of a sample that holds one."""
    for extension in (*TEXT_EXTENSIONS, *JSON_EXTENSIONS):
        found = sample.labels.get(extension, (None, ""))
        if isinstance(found, ValueError):
            raise found
        label, odd = found
        if label is not None:
            return label
        unused.fields.update([odd] if odd else [])
    return None
