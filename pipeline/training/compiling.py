"""Whether torch.compile compiles a training, and what this machine lacks for it."""

import logging
import sysconfig
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.training.config import TrainConfig
from pipeline.training.task import Task
from pipeline.training.worker import Worker, synchronised

MIN_STEPS = 5000
"""Steps from which compiling is worth its one to two minutes, if it saves half of a step of 90 ms."""

log = logging.getLogger(__name__)


def is_compiled(task: Task, config: TrainConfig, worker: Worker, steps: int) -> bool:
    """Whether the module of a training of so many steps is compiled: `train.compile`, or by default where that pays.

    By default a module is compiled on one GPU if its task `compiles_by_default`: small networks are limited by the launches of
    kernels, of which fused ones need fewer. SyncBN, which several GPUs use, would split the graph at every norm.

    Raises:
        UserError: if `train.compile` is true and this machine cannot compile.
    """
    if config.compile is False:
        return False
    pays = task.compiles_by_default and worker.device.type == "cuda" and not synchronised(worker) and steps >= MIN_STEPS
    if not (config.compile or pays):
        return False
    missing = missing_for(worker.device)
    if missing and config.compile:
        raise UserError(f"train.compile=true: this machine has {missing}; install that, or leave train.compile out")
    if missing:
        log.warning("the training is not compiled, and slower: this machine has %s", missing)
    return not missing


def missing_for(device: torch.device) -> str:
    """What torch.compile lacks for a device of this machine, in words, or ""."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler (g++)"
    if device.type != "cuda":
        return ""
    if not has_triton():
        return "no Triton for its GPU"
    # Triton compiles a module of C for each kernel.
    return "" if Path(sysconfig.get_paths()["include"], "Python.h").exists() else "no headers of Python (python3-dev)"
