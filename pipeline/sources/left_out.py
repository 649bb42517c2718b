"""What a source passes over: files of the system, which are no data, and everything else, which is counted and named."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

SHOWN = 6
"""Endings and names in a note; further ones are counted."""

_SYSTEM = frozenset(
    {
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found"),
        *("$recycle.bin", "recycler", "system volume information", "network trash folder", "temporary items"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
"""Names in lower case that macOS, Windows, Synology, QNAP and file systems leave in folders and archives."""

_METADATA = b"left out"


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's own, and thus neither class nor image."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


@dataclass
class LeftOut:
    """Counts what a source passes over.

    Attributes:
        endings: number of files by ending, which is not that of an image.
        what: noun of those files in the plural.
        notes: further notes, a phrase each.
    """

    what: str = "files"
    endings: Counter[str] = field(default_factory=Counter)
    loops: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, name: str) -> None:
        """Count a file that is no image by its name."""
        self.endings[os.path.splitext(name)[1].lower() or "no ending"] += 1

    def add(self, other: "LeftOut") -> None:
        """Count what another has counted."""
        self.endings.update(other.endings)
        self.loops += other.loops
        self.notes += other.notes

    def all_notes(self) -> list[str]:
        """Everything in phrases, one for each kind."""
        found = list(self.notes)
        if self.loops:
            found.append(f"{len(self.loops)} links back into the data: {some(self.loops)}")
        if self.endings:
            kinds = [
                f"{ending} {count}"
                for ending, count in sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
            ]
            found.append(f"{self.endings.total()} {self.what} that are no images by their ending: {some(kinds)}")
        return found


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first of these names, and the number of the others; `count`: of all, if only the first are given."""
    count = len(names) if count is None else count
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def with_notes(index: pa.Table, notes: Iterable[str]) -> pa.Table:
    """An index that carries these notes in its metadata."""
    listed = list(notes)
    return index.replace_schema_metadata({_METADATA: json.dumps(listed)}) if listed else index


def notes_of(index: pa.Table) -> list[str]:
    """What was left out of an index when it was made, in phrases."""
    return list(json.loads((index.schema.metadata or {}).get(_METADATA, b"[]")))
