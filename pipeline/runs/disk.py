"""What the runs of a work folder take on disk, and what of it only an unfinished run reads."""

import json
import logging
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import UserError, blame_field, one_line
from pipeline.storage.store import Store
from pipeline.training.config import TrainConfig

CHECKPOINT = "checkpoint-"
"""How names of checkpoints begin; copies of the best lie in `best/`, and stay."""
STATES = ("start.pt", "train.pt", "train/phase-*.pt", "linear.pt", "seg-probe.pt", "start", "soft-teacher")
"""What else a run writes for its resumption: states between phases and of probes, initial weights, and a teacher's copy."""

RELEASED = "removed when the run had finished: train.keep_finished=0"
"""The tag `checkpoint` of such a run."""

log = logging.getLogger(__name__)


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
        """Files and folders from which only an unfinished run resumes: its latest checkpoints, and other states."""
        trainings = (self.folder / "train", *sorted(filter(Path.is_dir, self.folder.glob("train/phase-*"))))
        found = (Path(store.uri) for folder in trainings for store in _checkpoints(Store.at(folder)))
        return (*found, *_states(self.folder))

    @property
    def removable(self) -> tuple[Path, ...]:
        """Those that no command reads any more."""
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
    """Bytes of these files, and of all files below these folders; nothing for links, nor for what cannot be read or a job
    removes meanwhile.
    """
    return sum(_bytes(path) for path in paths)


def _bytes(path: Path) -> int:
    try:
        info = path.lstat()
        if stat.S_ISDIR(info.st_mode):
            return bytes_of(*path.iterdir())
    except OSError:
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def remove_checkpoints(run: RunOnDisk) -> int:
    """Remove the checkpoints and states of a finished run; returns the bytes that they took."""
    freed = bytes_of(*run.removable)
    _remove(run.removable)
    return freed


def checkpoint_folder(config: TrainConfig, run: Path, name: str) -> str:
    """Absolute path or URI of the checkpoints of training `name` of the run in folder `run`.

    Raises:
        UserError: if the URI holds credentials.
    """
    if config.checkpoints is None:
        return str(run / name)
    with blame_field("train.checkpoints"):
        return Store.at(config.checkpoints).sub(f"{run.name}/{name}").uri


def release(run: Path, trainings: Mapping[str, TrainConfig]) -> None:
    """Remove what a run that has finished no longer needs, without the checkpoints that its trainings keep.

    A failure is a warning, as the results are there.
    """
    try:
        for name, config in trainings.items():
            found = _checkpoints(Store.at(checkpoint_folder(config, run, name)))
            for checkpoint in found[: max(0, len(found) - config.keep_finished)]:
                checkpoint.delete_folder()
        _remove(_states(run))
    except (OSError, UserError) as error:
        log.warning("checkpoints of the finished run %s stay: %s", run.name, one_line(error))


def _checkpoints(training: Store) -> list[Store]:
    """The checkpoints in the folder of a training, by position, without links."""
    found = [training.sub(name) for name in training.folders() if name.startswith(CHECKPOINT)]
    return [store for store in found if not (store.is_local and Path(store.uri).is_symlink())]


def _states(run: Path) -> tuple[Path, ...]:
    return tuple(path for pattern in STATES for path in sorted(run.glob(pattern)) if not path.is_symlink())


def _remove(paths: tuple[Path, ...]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
