"""What a checkpoint holds. Its directory has one file:

    state.pt    model, EMA, optimiser, loss scale, position (epoch, batch, step), evaluations, metrics of the steps since
                the checkpoint before; loads with weights_only

There is no random state in it: what a forward draws is a function of (seed, step, share), see `step.py`. Metrics are
committed with a checkpoint, and by who resumes from it once more, in case that nobody lived to log them: a step is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from pyarrow import fs
from torch import Tensor

from pipeline.errors import UserError, naming, one_line
from pipeline.storage.remote import resolve
from pipeline.storage.store import Store
from pipeline.training.config import TrainConfig
from pipeline.training.task import History

STATE_FILE = "state.pt"

log = logging.getLogger(__name__)


def checkpoint_folder(config: TrainConfig, run: Path, name: str) -> str:
    """Absolute path or address of the checkpoints of a part (`name`) of a run (its folder).

    Raises:
        UserError: where there are credentials in the address.
    """
    if config.checkpoints is None:
        return str(run / name)
    with naming("train.checkpoints"):
        return Store.at(config.checkpoints).sub(f"{run.name}/{name}").uri


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder of checkpoints, and the path within it.

    Raises:
        UserError: where no driver for it is installed.
    """
    return resolve(folder) if "://" in folder else (fs.LocalFileSystem(), folder.rstrip("/"))


@dataclass
class TrainingPosition:
    """Where training stands: `batch` is the next one of `epoch`, `step` counts optimiser steps, `samples` images seen."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0

    @property
    def name(self) -> str:
        """Of a checkpoint here: unique, and in order."""
        return f"checkpoint-{self.epoch:04d}-{self.batch:06d}"


@dataclass
class Snapshot:
    """What a checkpoint commits.

    Attributes:
        name: of the checkpoint directory, unique and ordered.
        state: everything that resuming needs, or None on ranks other than 0. Its tensors are those that are trained:
            who writes them later takes :func:`copy_to_cpu`.
        history: metrics since the last checkpoint.
        best: whether the evaluation in it is the best yet by `train.best_metric`.
    """

    name: str
    state: dict[str, Any] | None
    history: History
    best: bool = False


def copy_to_cpu(value: Any) -> Any:
    """A state whose tensors are copies on the CPU, as they are now."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: copy_to_cpu(item) for name, item in value.items()}
    return [copy_to_cpu(item) for item in value] if isinstance(value, list) else value


def load_state(directory: str | Path) -> dict[str, Any]:
    """The state in a checkpoint directory, on the CPU; nothing is unpickled but tensors and plain values.

    Raises:
        UserError: where the file is gone, damaged, or no state.
    """
    file = Path(directory) / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(_refusal(file, one_line(error))) from error
    if not isinstance(state, dict) or not {"model", "ema", "position", "evaluations"} <= state.keys():
        raise UserError(_refusal(file, "it holds no state of a training"))
    return state


def _refusal(file: Path, reason: str) -> str:
    return (
        f"the checkpoint {file} cannot be read ({reason}): remove {file.parent.parent}, and the same command trains anew "
        "from the cache, which is kept"
    )


def best_copy_path(path: str) -> str:
    """Where the copy of a checkpoint lies that was the best when it was written."""
    source = PurePosixPath(path)
    return str(source.parent / "best" / source.name)


def delete_previous_best(filesystem: fs.FileSystem, path: str) -> None:
    """Remove the copies of those checkpoints that were the best before this one."""
    best = PurePosixPath(best_copy_path(path))
    try:
        for known in filesystem.get_file_info(fs.FileSelector(str(best.parent), allow_not_found=True)):
            if known.type == fs.FileType.Directory and known.base_name != best.name:
                filesystem.delete_dir(known.path)
    except OSError as error:
        log.warning("an earlier best checkpoint stays in %s: %s", best.parent, one_line(error))
