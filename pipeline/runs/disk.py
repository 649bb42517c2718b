"""What the runs of a work folder take on disk, and what of it can go."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHECKPOINTS = "checkpoint-*"
"""Folders of a training from which its run resumes; copies of the best lie in `best/`, and stay."""


@dataclass(frozen=True)
class RunOnDisk:
    """A run in the work folder.

    Attributes:
        state: `finished`, `unfinished`, or `unreadable` if its run.json is damaged.
    """

    folder: Path
    state: str

    @cached_property
    def checkpoints(self) -> tuple[Path, ...]:
        """The folders of its latest checkpoints, from which only an unfinished run resumes."""
        found = (path for path in self.folder.rglob(CHECKPOINTS) if path.parent.name != "best" and path.is_dir())
        return tuple(sorted(path for path in found if not path.is_symlink()))

    @property
    def removable(self) -> tuple[Path, ...]:
        """The checkpoints that no command reads any more."""
        return self.checkpoints if self.state == "finished" else ()


def runs_of(work: Path) -> list[RunOnDisk]:
    """The runs in a work folder, by name."""
    return [RunOnDisk(file.parent, _state(file)) for file in sorted((work / "runs").glob("*/run.json"))]


def _state(file: Path) -> str:
    try:
        return "finished" if json.loads(file.read_text(encoding="utf-8"))["finished"] is True else "unfinished"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unreadable"


def bytes_of(*paths: Path) -> int:
    """Bytes of these files, and of all files below these folders; links count nothing."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        total += sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
    return total


def remove_checkpoints(run: RunOnDisk) -> int:
    """Remove the checkpoints of a finished run; returns the bytes that they took."""
    freed = bytes_of(*run.removable)
    for folder in run.removable:
        shutil.rmtree(folder)
    return freed
