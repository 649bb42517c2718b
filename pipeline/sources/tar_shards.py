"""Images in tar files in the WebDataset layout: adjacent members with the same basename are one sample."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, ClassVar

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.sources.base import IMAGE_EXTENSIONS, IndexRow, by_file, foreign_name, make_index, oversize
from pipeline.sources.locations import readable_name

_KEY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]+)")
_MAX_TEXT = 1 << 20
"""Maximum bytes of a label member or an extended header, which are read as a whole."""


@dataclass(frozen=True)
class TarShards:
    """Uncompressed tar files; `shards` are their absolute paths.

    A sample id is `<tar file name>/<key>`. A label is the decimal text of a `.cls` member or `label` in a `.json` member.
    The layout has no class names.
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
        """One row per sample with an image; `offset` and `size` locate the image's bytes in the tar."""
        rows = [row for shard in self.shards for row in _index_tar(shard)]
        return make_index(rows, location=self.location, looked_for=f"{', '.join(IMAGE_EXTENSIONS)} members")

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


def _index_tar(path: str) -> Iterator[IndexRow]:
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            members = (
                (match[1], match[2].lower(), member) for member in _advancing(tar) if (match := _image_or_label(member))
            )
            for key, group in groupby(members, key=lambda entry: entry[0]):
                sample = {extension: member for _, extension, member in group}
                image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
                if image is None:
                    _refuse_dotted(sample)
                else:
                    sample_id = f"{os.path.basename(path)}/{key.removeprefix('./')}"
                    yield IndexRow(sample_id, _label(tar, sample), path, image.offset_data, image.size)
            _refuse_missing_end(tar)
    except (tarfile.TarError, OSError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: truncated, compressed or not a tar file ({error}); fetch it again, or unpack .gz files first"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct or remove that member") from error


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


def _image_or_label(member: tarfile.TarInfo) -> re.Match[str] | None:
    match = _KEY.fullmatch(member.name) if member.isreg() else None
    if match and (name := foreign_name(match[0])):
        raise ValueError(f"the name of member {name!r} is not valid UTF-8")
    return match


def _refuse_missing_end(tar: tarfile.TarFile) -> None:
    # tarfile treats a damaged or truncated header as the end of the archive; the real end is a block of zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end marker at byte {tar.offset}")


def _label(tar: tarfile.TarFile, sample: dict[str, tarfile.TarInfo]) -> int | None:
    for extension, parse in ((".cls", int), (".json", _json_label)):
        member = sample.get(extension)
        file = member and tar.extractfile(member)
        if member and file:
            if member.size > _MAX_TEXT:
                raise ValueError(f"the label in member '{member.name}' takes {member.size} bytes")
            try:
                return _in_64_bits(parse(file.read()))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the label in member '{member.name}' is not an integer ({error})") from error
    return None


def _in_64_bits(label: int | None) -> int | None:
    if label is not None and label.bit_length() > 63:
        raise ValueError("more than 64 bits")
    return label


def _json_label(text: bytes) -> int | None:
    content = json.loads(text)
    label = content.get("label") if isinstance(content, dict) else None
    if label is not None and not isinstance(label, int):
        raise ValueError(f"label is {label!r}")
    return label
