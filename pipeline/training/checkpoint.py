"""The content of a checkpoint: a directory with `state.pt`, which loads with weights_only.

It holds model, EMA, optimiser, loss scale, position (epoch, batch, step), evaluations, and the metrics since the previous
checkpoint, which are committed again on resumption if the previous process died before logging them. It needs no random
state: the random numbers of a forward are a function of (seed, step, share), see `step.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from pipeline.errors import UserError, one_line
from pipeline.storage.remote import list_infos, resolve

if TYPE_CHECKING:  # it imports timm
    from pipeline.training.task import History

STATE_FILE = "state.pt"

log = logging.getLogger(__name__)


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """File system of a checkpoint folder, and the path in it; UserError if no driver for it is installed."""
    return resolve(folder) if "://" in folder else (fs.LocalFileSystem(), folder.rstrip("/"))


@dataclass
class TrainingPosition:
    """`batch` is the next one of `epoch`; `step` counts optimiser steps, `samples` images."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0

    @property
    def name(self) -> str:
        """Name of a checkpoint at this position; names sort by position."""
        return f"checkpoint-{self.epoch:04d}-{self.batch:06d}"


@dataclass
class Snapshot:
    """A checkpoint to commit.

    Attributes:
        state: for resumption, None on ranks other than 0. Training changes its tensors: to write them later, copy them.
        history: metrics since the previous checkpoint.
        best: whether its evaluation is the best so far by `train.best_metric`.
    """

    name: str
    state: dict[str, Any] | None
    history: History
    best: bool = False


def load_state(directory: str | Path) -> dict[str, Any]:
    """The state in a checkpoint directory, on the CPU; only tensors and plain values are unpickled.

    Raises:
        UserError: if the file is missing, damaged, or not a state.
    """
    import torch  # takes seconds, and Ray Train's controller, which imports this module, can do without

    file = Path(directory) / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(_refusal(file, one_line(error))) from error
    if not isinstance(state, dict) or not {"model", "ema", "position", "evaluations"} <= state.keys():
        raise UserError(_refusal(file, "it holds no training state"))
    return state


def _refusal(file: Path, reason: str) -> str:
    return (
        f"the checkpoint {file} cannot be read ({reason}): remove {file.parent.parent}, and the same command restarts the "
        "training from the cache, which is kept"
    )


def best_copy_path(path: str) -> str:
    """Path of the copy of a checkpoint that is kept as the best."""
    source = PurePosixPath(path)
    return str(source.parent / "best" / source.name)


def delete_previous_best(filesystem: fs.FileSystem, path: str) -> None:
    """Delete the copies of checkpoints that were the best before this one."""
    best = PurePosixPath(best_copy_path(path))
    try:
        for known in list_infos(filesystem, str(best.parent), missing=True):
            if known.type == fs.FileType.Directory and known.base_name != best.name:
                filesystem.delete_dir(known.path)
    except OSError as error:
        log.warning("an earlier best checkpoint stays in %s: %s", best.parent, one_line(error))
