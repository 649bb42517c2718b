"""A source in two: a stated share of its images is held out, the others are trained on.

The name of an image decides where it belongs, so that none changes sides when others are added or removed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pyarrow as pa

from pipeline.sources.base import ROWS_HELD, NoImagesError, Source
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.listed import Listed
from pipeline.storage.files import Entry

if TYPE_CHECKING:
    from pipeline.sources.streamed import StreamedSource, Take

Split = Literal["train", "val"]


@dataclass(frozen=True)
class HoldOut:
    """One side of a source, as a :class:`~pipeline.sources.streamed.StreamedSource` where `whole` is one.

    Args:
        share: of the images that are held out, between 0 and 1.
        split: ``val`` for these, ``train`` for the others.
    """

    whole: Source
    share: float
    split: Split

    @property
    def name(self) -> str:
        """Readable name that names the share, too: another share is another data set."""
        return self.called(self.whole.name)

    def called(self, name: str) -> str:
        """The name of this side if the whole is called so."""
        return f"{name}-{self._words.replace(' ', '-')}"

    @property
    def location(self) -> str:
        """Location of the whole, and which of its images these are."""
        return f"{self.whole.location} ({self._words})"

    @property
    def part(self) -> float:
        """About which part of the whole these are, between 0 and 1."""
        return self.share if self.split == "val" else 1 - self.share

    @property
    def _words(self) -> str:
        return f"{self.share:g} held out" if self.split == "val" else f"without {self.share:g}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole: both sides have the same."""
        return self.whole.classes

    @property
    def random_access(self) -> bool:
        """As the whole."""
        return self.whole.random_access

    def versions(self) -> dict[str, int]:
        """Those of the files of the whole."""
        return self.whole.versions()

    def only(self, files: Sequence[str]) -> "HoldOut":
        """This side of those files."""
        return replace(self, whole=self.whole.only(files))

    def listed(self) -> Listed | None:
        """As the whole, with the index of this side, which its digest names; None if it does not consist of single files."""
        if not isinstance(self.whole, ImageFolder):
            return None
        whole = self.whole.listed()
        digest = f"{whole.digest} {self.split} {self.share!r}"  # the location names only six digits of the share
        return replace(whole, digest=digest, index=lambda: self._side(whole.index()))

    def index(self) -> pa.Table:
        """The rows of this side; raises as the whole does, and if there are none."""
        return self._side(self.whole.index())

    def _side(self, rows: pa.Table) -> pa.Table:
        """Those rows of the whole that are of this side; raises as `index`."""
        mine = self._mine(rows)
        if not mine.num_rows:
            raise NoImagesError(
                f"{self.location}: none of the {rows.num_rows} images there; give another share (data.val), or a folder"
            )
        return mine

    def read(self, rows: pa.Table) -> Iterator[bytes | Exception]:
        """As the whole."""
        return self.whole.read(rows)

    def _mine(self, rows: pa.Table) -> pa.Table:
        limit, mine = int(self.share * 2**64), np.empty(rows.num_rows, bool)
        for start in range(0, rows.num_rows, ROWS_HELD):
            ids = rows["sample_id"].slice(start, ROWS_HELD).to_pylist()
            mine[start : start + len(ids)] = [(_place(sample_id) < limit) == (self.split == "val") for sample_id in ids]
        return rows.filter(pa.array(mine))

    @property
    def _streamed(self) -> "StreamedSource":
        return cast("StreamedSource", self.whole)

    @property
    def identity(self) -> str:
        """That of the whole, and the side."""
        return f"{self._streamed.identity} {self._words}"

    @property
    def may_have_labels(self) -> bool:
        """As the whole."""
        return self._streamed.may_have_labels

    def archives(self) -> list[Entry]:
        """Those of the whole."""
        return self._streamed.archives()

    def count(self, archives: Sequence[str]) -> tuple[int, int] | None:
        """About the part of what the whole counts."""
        counted = self._streamed.count(archives)
        return None if counted is None else (round(counted[0] * self.part), round(counted[1] * self.part))

    def prepared(self, archives: Sequence[str]) -> "HoldOut":
        """This side of the whole once it is prepared."""
        return replace(self, whole=self._streamed.prepared(archives))

    def stream(self, archive: str, take: "Take") -> tuple[pa.Table, str]:
        """As the whole, whose images are all handed over, with the rows of this side alone."""
        rows, passed_over = self._streamed.stream(archive, take)
        return self._mine(rows), passed_over

    def notes(self, passed_over: Iterable[str]) -> list[str]:
        """Those of the whole."""
        return self._streamed.notes(passed_over)


def _place(sample_id: str) -> int:
    """An even distribution over 64 bits."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest())
