"""Images in tar files in the WebDataset layout: members with the same path up to the name's first dot are one sample."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, ClassVar

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.sources.base import IndexRow, by_file, file_version, foreign_name, make_index, oversize
from pipeline.sources.left_out import LeftOut, is_system, some
from pipeline.sources.locations import readable_name
from pipeline.sources.tar_labels import JSON_EXTENSIONS, TEXT_EXTENSIONS, parse_label

_KEY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]+)")
_MAX_TEXT = 1 << 20
"""Maximum bytes of a label member or an extended header, which are read as a whole."""


@dataclass(frozen=True)
class TarShards:
    """Uncompressed tar files; `shards` are their absolute paths.

    A sample id is `<tar file name>/<key>`; the members of a key may be anywhere in the tar. `pipeline.sources.tar_labels` says
    which members hold a label. The layout has no class names.
    """

    random_access: ClassVar[bool] = True

    location: str
    shards: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last two components of the location, without `.tar`."""
        return readable_name(self.location)

    def index(self) -> pa.Table:
        """One row per sample with an image; `offset` and `size` locate the image's bytes in the tar.

        The index's notes count the members that are not used.
        """
        unused = _Unused()
        rows = [row for shard in self.shards for row in _index_tar(shard, unused)]
        looked_for = f"{', '.join(IMAGE_EXTENSIONS)} members"
        return make_index(rows, location=self.location, looked_for=looked_for, left_out=unused.all_notes())

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """Bytes of these index rows; an OSError instead for each row that cannot be read."""
        for shard, extents in by_file(rows):
            yield from _read_shard(shard, extents)


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
        data = file.read(size)
    except OSError as error:
        return error
    if len(data) < size:
        return OSError(f"{file.name}: ends after {len(data)} of {size} bytes at offset {offset}")
    return data


Sample = dict[str, tarfile.TarInfo]
"""The members of one key by extension, in lower case."""


@dataclass
class _Unused:
    """Members of tars that are not used.

    Attributes:
        other: neither image nor label.
        alone: ids of samples with a label and without an image.
        further: extensions of images of a sample that has another.
        fields: fields of JSON members that look like a label and hold no number.
    """

    other: LeftOut = field(default_factory=lambda: LeftOut("members"))
    alone: list[str] = field(default_factory=list)
    further: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)

    def all_notes(self) -> list[str]:
        """One phrase for each kind."""
        kinds = [f"{extension} {count}" for extension, count in self.further.items()]
        odd = [f"{name} in {count} members" for name, count in self.fields.items()]
        notes = {
            f"{len(self.alone)} labels without an image: {some(self.alone)}": self.alone,
            f"{self.further.total()} images of samples that have another: {some(kinds)}": kinds,
            f"JSON fields that hold no class number: {some(odd)}": odd,
        }
        return [*(note for note, found in notes.items() if found), *self.other.all_notes()]


def _index_tar(path: str, unused: _Unused) -> Iterator[IndexRow]:
    """The samples with an image, in the order of their first members."""
    try:
        version = file_version(os.stat(path))
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            for key, sample in _samples(tar).items():
                sample_id = f"{os.path.basename(path)}/{key.removeprefix('./')}"
                images = [extension for extension in IMAGE_EXTENSIONS if extension in sample]
                unused.further.update(images[1:])
                unused.other.endings.update(sample.keys() - {*images, *TEXT_EXTENSIONS, *JSON_EXTENSIONS})
                if images:
                    image = sample[images[0]]
                    label = _label(tar, sample, unused)
                    yield IndexRow(sample_id, label, path, image.offset_data, image.size, version)
                else:
                    _refuse_dotted(sample)
                    if not sample.keys().isdisjoint((*TEXT_EXTENSIONS, *JSON_EXTENSIONS)):
                        unused.alone.append(sample_id)
            _refuse_missing_end(tar)
    except (tarfile.TarError, OSError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: truncated, compressed or not a tar file ({error}); fetch it again, or unpack .gz files first"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct or remove that member") from error


def _samples(tar: tarfile.TarFile) -> dict[str, Sample]:
    """The members of every key by extension; a member that occurs twice is refused, since one of the two would be lost."""
    samples: dict[str, Sample] = {}
    for member in _advancing(tar):
        if match := _match(member):
            sample, extension = samples.setdefault(match[1], {}), match[2].lower()
            if (known := sample.get(extension)) is not None:
                if known.name == member.name:
                    raise ValueError(f"member '{member.name}' occurs twice")
                raise ValueError(f"members '{known.name}' and '{member.name}' differ only in upper and lower case")
            sample[extension] = member
    return samples


def _refuse_dotted(sample: dict[str, tarfile.TarInfo]) -> None:
    """Refuse names such as `a.b.jpg`: WebDataset takes all after the first dot as the extension, and would lose the image."""
    for extension, member in sample.items():
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


def _label(tar: tarfile.TarFile, sample: Sample, unused: _Unused) -> int | None:
    """The label in the first member of a sample that holds one."""
    for extension in (*TEXT_EXTENSIONS, *JSON_EXTENSIONS):
        member = sample.get(extension)
        file = member and tar.extractfile(member)
        if member and file:
            if member.size > _MAX_TEXT:
                raise ValueError(f"the label in member '{member.name}' takes {member.size} bytes")
            try:
                label, odd = parse_label(file.read(), extension)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the label in member '{member.name}' is not a class number ({error})") from error
            if label is not None:
                return label
            unused.fields.update([odd] if odd else [])
    return None
