"""Training in the driver's own process, for debugging: what a Ray Train worker runs, without Ray Train.

Its local mode (`num_workers=0`) is no base for this: it keeps no checkpoint and resumes from none. Here, the checkpoints are
those of `ray_train.py`, written while the training waits. A start resumes from the newest one in the folder, whichever mode
wrote it; a start on Ray resumes only from those that Ray Train has registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyarrow import fs

from pipeline.storage.remote import list_infos
from pipeline.training.checkpoint import (
    STATE_FILE,
    Snapshot,
    best_copy_path,
    delete_previous_best,
    load_state,
    open_folder,
)
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.task import History, Task
from pipeline.training.worker import STOP_REQUESTED, Worker

if TYPE_CHECKING:
    from ray.train import Checkpoint


def local_worker(shares: int, folder: str, stopped: Callable[[], bool]) -> Worker:
    """The only training worker, with all shares of the global batch, on the GPU if there is one.

    Args:
        folder: of the checkpoints.
        stopped: whether training is asked to stop.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    filesystem, path = open_folder(folder)

    def dump(name: str, content: dict[str, Any]) -> str:
        with filesystem.open_output_stream(f"{path}/{name}") as stream:
            torch.save(content, stream)
        return f"{path}/{name}"

    return Worker(
        device=device,
        wrap=lambda module, _: module.to(device),
        shares=shares,
        notice=lambda: STOP_REQUESTED if stopped() else None,
        dump=dump,
    )


def train_in_process(
    tasks: Sequence[Task],
    config: TrainConfig,
    worker: Worker,
    folder: str,
    on_commit: Callable[[History, str | None], None],
) -> Checkpoint:
    """Train the tasks of a worker's shares from the newest checkpoint in `folder`, if there is one; returns the last.

    Raises whatever the task raises, with its own traceback, and what :func:`train` raises.
    """
    from ray.train import Checkpoint

    checkpoints = _Checkpoints(folder, config.keep_checkpoints, on_commit)
    known = checkpoints.paths()
    state = None
    if known:
        with Checkpoint(known[-1], checkpoints.filesystem).as_directory() as directory:
            state = load_state(directory)
    train(tasks[0], config, worker, state, checkpoints.commit, tasks[1:])
    return Checkpoint(checkpoints.paths()[-1], checkpoints.filesystem)


class _Checkpoints:
    """The folder of the checkpoints of a training in this process."""

    def __init__(self, folder: str, keep: int, on_commit: Callable[[History, str | None], None]) -> None:
        self.filesystem, self.path = open_folder(folder)
        self.keep, self.on_commit = keep, on_commit
        self.own: list[str] = []

    def paths(self) -> list[str]:
        """Paths of the checkpoints, by position."""
        found = list_infos(self.filesystem, self.path, missing=True)
        folders = (f"{self.path}/{info.base_name}" for info in found if info.type == fs.FileType.Directory)
        return sorted(folder for folder in folders if self.filesystem.get_file_info(f"{folder}/{STATE_FILE}").is_file)

    def commit(self, snapshot: Snapshot) -> None:
        """Write a snapshot, delete own checkpoints that are not kept, and pass on its metrics."""
        if snapshot.state is None:
            self.on_commit(snapshot.history, None)
            return
        path = f"{self.path}/{snapshot.name}"
        if snapshot.best:
            self._write(best_copy_path(path), snapshot.state)
            delete_previous_best(self.filesystem, path)
        self._write(path, snapshot.state)
        self.own.append(path)
        if len(self.own) > self.keep:  # others may be registered with Ray Train, which resumes from them
            self.filesystem.delete_dir(self.own.pop(0))
        self.on_commit(snapshot.history, path)

    def _write(self, path: str, state: dict[str, Any]) -> None:
        """Write a state under a name of its own first: a process that ends meanwhile leaves no damaged checkpoint."""
        self.filesystem.create_dir(path, recursive=True)
        unfinished = f"{path}/{STATE_FILE}.part"
        with self.filesystem.open_output_stream(unfinished) as stream:
            torch.save(state, stream)
        self.filesystem.move(unfinished, f"{path}/{STATE_FILE}")
