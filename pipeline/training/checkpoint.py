"""What a checkpoint holds. Its directory has one file:

    state.pt    model, EMA, optimiser, loss scale, position (epoch, batch, step), evaluations; loads with weights_only

There is no random state in it: what a forward draws is a function of (seed, step, share), see `step.py`. Metrics of the
steps since the last checkpoint are committed with it: a step that is repeated after a crash is logged once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from pyarrow import fs
from torch import Tensor

from pipeline.cache.remote import resolve
from pipeline.cache.store import Store
from pipeline.config import TrainConfig
from pipeline.errors import UserError, naming
from pipeline.training.task import History

STATE_FILE = "state.pt"


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
class Position:
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
            who writes them later takes :func:`copied`.
        history: metrics since the last checkpoint.
        best: whether the evaluation in it is the best yet by `train.best_metric`.
    """

    name: str
    state: dict[str, Any] | None
    history: History
    best: bool = False


def copied(value: Any) -> Any:
    """A state whose tensors are copies on the CPU, as they are now."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: copied(item) for name, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def load_state(directory: str | Path) -> dict[str, Any]:
    """The state in a checkpoint directory, on the CPU; nothing is unpickled but tensors and plain values.

    Raises:
        UserError: where the file is gone, damaged, or no state.
    """
    file = Path(directory) / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(_refusal(file, " ".join(str(error).split())[:160])) from error
    if not isinstance(state, dict) or not {"model", "ema", "position", "evaluations"} <= state.keys():
        raise UserError(_refusal(file, "it holds no state of a training"))
    return state


def _refusal(file: Path, reason: str) -> str:
    return (
        f"the checkpoint {file} cannot be read ({reason}): remove {file.parent.parent}, and the same command trains anew "
        "from the cache, which is kept"
    )


def keep_best(filesystem: fs.FileSystem, path: str) -> None:
    """Copy a checkpoint to ``best/`` beside it, and remove the one that was the best.

    Ray Train's own retention knows the latest or the best, not both.
    """
    source = PurePosixPath(path)
    folder = source.parent / "best"
    target = folder / source.name
    filesystem.create_dir(str(target), recursive=True)
    fs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=filesystem)
    for known in filesystem.get_file_info(fs.FileSelector(str(folder))):
        if known.type == fs.FileType.Directory and known.base_name != source.name:
            filesystem.delete_dir(known.path)
