"""One optimiser step over this worker's shares of the global batch.

Gradients of micro-batches are weighted by their images and accumulated, so that the gradient is the mean over the global
batch however it is split; BatchNorm's statistics are those of a micro-batch, SyncBN's of the workers' simultaneous ones.
A step with a non-finite gradient changes no weight (only BatchNorm's statistics): in float16 it halves the loss scale; in
float32 and bfloat16 training has diverged.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.compiling import is_compiled
from pipeline.training.config import TrainConfig
from pipeline.training.meter import StepTimer
from pipeline.training.task import Task, TrainingBatch, split_batch
from pipeline.training.worker import Worker, synchronised

_STATISTICS = ("running_mean", "running_var")
"""Buffers of BatchNorm, averaged like weights."""


class ModelEma:
    """An exponential moving average of parameters and of BatchNorm's statistics, in evaluation mode as `module`; it is
    evaluated and exported.

    Other buffers are shared with the trained module. The decay of an update is min(`decay`, (1 + steps) / (10 + steps)), as
    in TensorFlow's ExponentialMovingAverage, so that the initial weights soon lose their influence: it reaches 0.99 after
    890 steps and 0.9998 after 44,990.

    Args:
        module: on its device, in its memory format. It may be compiled or wrapped later, but its tensors may only change in
            place.
        decay: in [0, 1); 0: no averaging.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        own = {id(buffer): buffer for name, buffer in module.named_buffers() if not name.endswith(_STATISTICS)}
        self.module = deepcopy(module, own).eval()
        self._current, self._averaged = _averaged_tensors(module), _averaged_tensors(self.module)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Average in the current weights, after this number of optimiser steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)


def _averaged_tensors(module: nn.Module) -> list[Tensor]:
    statistics = [buffer for name, buffer in module.named_buffers() if name.endswith(_STATISTICS)]
    return [*module.parameters(), *statistics]


class Stepper:
    """Module, averaged module, optimiser and schedule of a run; `steps` holds the number of steps of every epoch."""

    def __init__(self, task: Task, config: TrainConfig, worker: Worker, steps: Sequence[int]) -> None:
        self.task, self.config, self.worker = task, config, worker
        device = worker.device
        module = task.module.to(device).to(memory_format=torch.channels_last)
        if synchronised(worker):
            module = convert_sync_batchnorm(module)  # timm's: torch's drops the activations in timm's norms
        self.module: nn.Module = module
        self.average = ModelEma(module, config.ema_decay)
        self.compiled = is_compiled(task, config, worker, sum(steps))
        if self.compiled:
            module.compile()
        self.wrapped = worker.wrap(module, task.uses_all_parameters)
        groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=exempt_from_decay(module))
        groups = with_lr_factors(groups, module, task.lr_factors)
        self.optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, fused=True)
        self.dtype = autocast_dtype(config, device)
        self.half = self.dtype == torch.float16
        # enabled on a GPU even without scaling: it skips a non-finite step without a GPU sync
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=65536.0 if self.half else 1.0,
            growth_interval=2000 if self.half else 2**31 - 1,  # constant
            enabled=self.half or device.type == "cuda",
        )
        self.schedule = task.schedule(self.optimizer, config) or CosineLRScheduler(
            self.optimizer,
            t_initial=sum(steps),
            lr_min=config.min_lr,
            **warmup(config, steps),
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "model": self.module.state_dict(),
            "ema": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        # the module comes last: it owns the buffers that the average shares
        self.average.module.load_state_dict(state["ema"])
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if written without scaling, as on a CPU
            self.scaler.load_state_dict(state["scaler"])

    def __call__(self, batches: Sequence[TrainingBatch], step: int, clock: StepTimer) -> dict[str, Tensor]:
        """Run optimiser step number `step`, from 0, on one batch of each own share.

        Returns:
            Means over this worker's images, on its device: ``loss``, ``loss/<part>``; and the global ``grad_norm``.
        """
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.before_step(batches)
        parts = self._accumulate(batches, step, clock)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_grad)
        if self.scaler.is_enabled() or torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            # if the scaler skips the step on the device, this averages in the previous weights again
            self.average.update(step + 1)
        self.scaler.update()
        self.task.after_step(batches)
        return {**parts, "grad_norm": norm.detach()}

    def _accumulate(self, batches: Sequence[TrainingBatch], step: int, clock: StepTimer) -> dict[str, Tensor]:
        worker, images = self.worker, sum(len(batch.keys) for batch in batches)
        everywhere = images // len(batches) * worker.all_shares
        parts = self.task.parts(batches[0])
        cuts = [worker.pieces(len(part.keys), self.config.micro_batch) for part in parts]
        forwards = sum(map(sum, cuts))
        sums: dict[str, Tensor] = {}
        for share, batch, own_cuts in zip(worker.own_shares, batches, zip(*cuts, strict=True), strict=True):
            seeds = np.random.SeedSequence([self.task.seed, step, share])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            for piece, count in self._pieces(batch, own_cuts):
                forwards -= 1
                weight = count * worker.world / everywhere  # DDP averages gradients over the workers
                for name, value in self._backward(piece, weight, not forwards, clock).items():
                    sums[name] = sums.get(name, 0) + value.float() * (count / images)
        return sums

    def _pieces(self, batch: TrainingBatch, cuts: Sequence[int]) -> Iterator[tuple[TrainingBatch, int]]:
        """The micro-batches of a batch, `cuts` of each part, and the images of each that count.

        A part with fewer images than forwards repeats its last micro-batch, which does not count: the other ranks wait for it.
        """
        for part, forwards in zip(self.task.parts(batch), cuts, strict=True):
            pieces = split_batch(part, forwards)
            yield from ((piece, len(piece.keys)) for piece in pieces)
            yield from ((pieces[-1], 0) for _ in range(forwards - len(pieces)))

    def _backward(self, piece: TrainingBatch, weight: float, synchronise: bool, clock: StepTimer) -> dict[str, Tensor]:
        device = self.worker.device
        wrapped: Any = self.wrapped
        unsynchronised = not synchronise and isinstance(wrapped, DistributedDataParallel)
        with wrapped.no_sync() if unsynchronised else nullcontext():
            with clock.part("forward"), torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss, parts = self.task.loss(wrapped, piece, device)
            with clock.part("backward"):
                self.scaler.scale(loss * weight).backward()
        return {"loss": loss.detach(), **{f"loss/{name}": part for name, part in parts.items()}}


def warmup(config: TrainConfig, steps: Sequence[int]) -> dict[str, Any]:
    """Arguments of a timm scheduler by step: linear warm-up, given the number of steps of every epoch."""
    return {
        "warmup_t": min(round(config.warmup_epochs * steps[0]), sum(steps) - 1),
        "warmup_lr_init": config.min_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }


def with_lr_factors(
    groups: Sequence[dict[str, Any]], module: nn.Module, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The groups of an optimiser divided by the factors of their parameters' learning rates, which timm's schedulers apply.

    Args:
        factors: by the name of a submodule, none of which contains another.
    """
    if not factors:
        return [*groups]
    own = {id(weight): factor for name, factor in factors.items() for weight in module.get_submodule(name).parameters()}
    divided = []
    for group in groups:
        for factor in (1.0, *dict.fromkeys(factors.values())):
            if weights := [weight for weight in group["params"] if own.get(id(weight), 1.0) == factor]:
                divided.append({**group, "params": weights, "lr_scale": factor})
    return sorted(divided, key=lambda group: group["lr_scale"] != 1)  # the first group's rate is logged


def exempt_from_decay(module: nn.Module) -> list[str]:
    """Parameters that timm networks in the module exempt from weight decay, besides norms, biases and other vectors."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    ]


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of the forward: `train.precision`; for ``auto`` the fastest that the device supports natively."""
    if config.precision != "auto":
        dtype: torch.dtype = getattr(torch, config.precision)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
