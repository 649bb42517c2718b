"""The training engine that distillation and fine-tuning share: a plain PyTorch loop, and Ray Train around it.

`train` knows a :class:`Task` and nothing of Ray; `fit` runs it on Ray Train workers with DDP, checkpoints and resume.
Ray is imported inside `fit` and its workers only, so that the loop runs (and is benchmarked) on machines without it.

A checkpoint directory holds one file:

    state.pt    model, EMA, optimiser, position (epoch, batch, step), random state, evaluations; loads with weights_only

Metrics of the steps since the last checkpoint are committed with it: a step that is repeated after a crash is logged
once.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from ray.train import Checkpoint

STATE_FILE = "state.pt"
POINTS_PER_EPOCH = 50
"""Points of a loss curve per epoch; each is the mean over the steps since the last one."""

History = list[tuple[int, dict[str, float]]]
"""(step, metrics) in order."""


class TrainingBatch(Protocol):
    """What the engine needs to know of a batch."""

    @property
    def keys(self) -> list[str]:
        """Sample ids."""


class Task(ABC):
    """What is trained, on what, and how it is judged.

    Attributes:
        module: whose forward gives the loss of a batch; on the CPU until the engine moves it.
        evaluates_everywhere: whether every rank is called to evaluate, and not rank 0 alone; rank 0's metrics count.
    """

    module: nn.Module
    evaluates_everywhere: ClassVar[bool] = False

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """Steps of an epoch, equal on every rank."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[TrainingBatch]:
        """This rank's batches of an epoch from number `start` on."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of a batch, and its parts by name, detached; called under autocast."""

    @abstractmethod
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Metrics of a module on held-out data; called on rank 0 with the EMA weights, on the training device."""

    def schedule(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Scheduler | None:
        """A learning rate by step of the task's own; None: linear warm-up, then a cosine."""
        return None


@dataclass
class Position:
    """Where training stands: `batch` is the next one of `epoch`, `step` counts optimiser steps, `samples` images seen."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0


@dataclass
class Snapshot:
    """What a checkpoint commits.

    Attributes:
        name: of the checkpoint directory, unique and ordered.
        state: everything that resuming needs, or None on ranks other than 0.
        history: metrics since the last checkpoint.
    """

    name: str
    state: dict[str, Any] | None
    history: History


@dataclass(frozen=True)
class Worker:
    """This process among the training workers."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, so that all of them stop together."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags)

    def earliest(self, found: tuple[int, str] | None) -> str:
        """The text of the lowest step that any rank found, on all of them; one at least has found something."""
        every: list[tuple[int, str] | None] = [found] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(every, found)
        return min(item for item in every if item)[1]


class DivergedError(UserError):
    """The loss is no longer finite; the message names the batch."""


def train(
    task: Task, config: TrainConfig, worker: Worker, state: dict[str, Any] | None, commit: Callable[[Snapshot], None]
) -> None:
    """Train from `state` (or from the start) to the last epoch.

    Args:
        commit: called on every rank at each checkpoint, first of all with the evaluation before training.

    Raises:
        DivergedError: where the loss is not finite, naming the first such batch.
    """
    loop = _Loop(task, config, worker)
    if state is None:
        loop.evaluate()
        commit(loop.snapshot())
    else:
        loop.restore(state)
    while loop.position.epoch < config.epochs:
        loop.run_epoch(commit)


class _Loop:
    def __init__(self, task: Task, config: TrainConfig, worker: Worker) -> None:
        self.task, self.config, self.worker = task, config, worker
        module = task.module.to(worker.device).to(memory_format=torch.channels_last)
        if worker.world > 1 and worker.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self.module: nn.Module = module
        self.ema = ModelEmaV3(module, decay=config.ema_decay, use_warmup=True)
        self.wrapped = worker.wrap(module)
        # Norms, biases and other vectors are not decayed.
        groups = param_groups_weight_decay(module, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=worker.device.type == "cuda")
        self.position = Position()
        self.evaluations: History = []
        self.history: History = []
        self.schedule = task.schedule(self.optimizer, config) or self._make_schedule()

    def _make_schedule(self) -> Scheduler:
        steps = [self.task.steps(epoch) for epoch in range(self.config.epochs)]
        warmup = min(round(self.config.warmup_epochs * steps[0]), sum(steps) - 1)
        return CosineLRScheduler(
            self.optimizer,
            t_initial=sum(steps),
            lr_min=self.config.min_lr,
            warmup_t=warmup,
            warmup_lr_init=self.config.min_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )

    def restore(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        self.evaluations = [(step, metrics) for step, metrics in state["evaluations"]]
        torch.set_rng_state(state["rng"].cpu())

    def snapshot(self) -> Snapshot:
        position = self.position
        name = f"checkpoint-{position.epoch:04d}-{position.batch:06d}"
        history, self.history = self.history, []
        if self.worker.rank:
            return Snapshot(name, None, history)
        state = {
            "model": self.module.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": asdict(position),
            "evaluations": self.evaluations,
            "rng": torch.get_rng_state(),
        }
        return Snapshot(name, state, history)

    def evaluate(self) -> None:
        if self.worker.rank and not self.task.evaluates_everywhere:
            return
        metrics = self.task.evaluate(self.ema.module)
        if self.worker.rank:
            return
        self.evaluations.append((self.position.step, metrics))
        self.history.append((self.position.step, metrics))
        if metrics:
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            print(f"evaluated at step {self.position.step}  {shown}", flush=True)

    def run_epoch(self, commit: Callable[[Snapshot], None]) -> None:
        position, config = self.position, self.config
        steps = self.task.steps(position.epoch)
        meter = _Meter(self, steps)
        self.wrapped.train()
        with Progress(
            steps, "step", f"train epoch {position.epoch + 1}/{config.epochs}", initial=position.batch
        ) as progress:
            batches = self.task.batches(position.epoch, position.batch)
            for _ in range(steps - position.batch):
                batch = meter.wait_for(batches)
                meter.add(batch, *self._step(batch), len(batch.keys) * self.worker.world)
                progress.update(1, **meter.postfix())
                if config.checkpoint_steps and position.step % config.checkpoint_steps == 0 and position.batch < steps:
                    meter.flush()
                    commit(self.snapshot())
        meter.flush()
        position.epoch, position.batch = position.epoch + 1, 0
        self.evaluate()
        commit(self.snapshot())

    def _step(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        position, device = self.position, self.worker.device
        self.schedule.step_update(position.step)
        with torch.autocast(device.type, torch.bfloat16, enabled=_uses_bfloat16(self.config, device)):
            loss, parts = self.task.loss(self.wrapped, batch, device)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_grad)
        self.optimizer.step()
        position.step += 1
        position.batch += 1
        position.samples += len(batch.keys) * self.worker.world
        self.ema.update(self.module, step=position.step)
        return loss.detach(), {"grad_norm": norm.detach(), **{f"loss/{name}": part for name, part in parts.items()}}


class _Meter:
    """Losses, rate and time spent waiting for data, gathered on the device and read a few times an epoch."""

    def __init__(self, loop: _Loop, steps: int) -> None:
        self.loop = loop
        self.every = max(1, steps // POINTS_PER_EPOCH)
        self.pending: list[tuple[list[str], dict[str, Tensor]]] = []
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.latest: dict[str, float] = {}

    def wait_for(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, batch: TrainingBatch, loss: Tensor, parts: dict[str, Tensor], images: int) -> None:
        self.pending.append((batch.keys, {"loss": loss, **parts}))
        self.images += images
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([parts[name].float() for name in names]) for _, parts in self.pending]).cpu()
        self._check_finite(values[:, names.index("loss")])
        seconds = time.perf_counter() - self.started
        position = self.loop.position
        self.latest = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        self.latest |= {
            "learning_rate": self.loop.optimizer.param_groups[0]["lr"],
            "images_per_second": self.images / seconds,
            "data_wait_share": self.waited / seconds,
            "samples_seen": position.samples,
            "epoch": position.epoch + position.batch / max(1, self.loop.task.steps(position.epoch)),
        }
        self.loop.history.append((position.step, self.latest))
        self.pending, self.images, self.waited, self.started = [], 0, 0.0, time.perf_counter()

    def _check_finite(self, losses: Tensor) -> None:
        diverged = not torch.isfinite(losses).all()
        if not self.loop.worker.any_rank(diverged):
            return
        # One rank's gradients spoil the weights of all: of several bad batches the earliest is the cause.
        raise DivergedError(self.loop.worker.earliest(self._first_bad(losses) if diverged else None))

    def _first_bad(self, losses: Tensor) -> tuple[int, str]:
        first = int((~torch.isfinite(losses)).nonzero()[0])
        keys = self.pending[first][0]
        step = self.loop.position.step - len(self.pending) + first + 1
        return step, (
            f"the loss is {losses[first].item()} at step {step}; the batch holds {', '.join(keys[:8])} "
            f"({len(keys)} images); lower train.lr or train.clip_grad, or look at those images"
        )

    def postfix(self) -> dict[str, str]:
        if not self.latest:
            return {}
        return {
            "loss": f"{self.latest['loss']:.3f}",
            "img/s": f"{self.latest['images_per_second']:.0f}",
            "data": f"{self.latest['data_wait_share']:.0%}",
        }


def _uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16"


def load_state(directory: str | Path) -> dict[str, Any]:
    """The state in a checkpoint directory, on the CPU; nothing is unpickled but tensors and plain values."""
    state: dict[str, Any] = torch.load(Path(directory) / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def fit(
    make_task: Callable[[dict[str, Any], int, int], Task],
    payload: dict[str, Any],
    config: TrainConfig,
    folder: str,
    on_commit: Callable[[History, str | None], None],
) -> Checkpoint:
    """Train on Ray Train workers, from the last checkpoint in `folder` if there is one.

    Args:
        make_task: called in every worker with `payload`, its rank and the number of workers.
        folder: where checkpoints go: an absolute path or URI, shared by all nodes.
        on_commit: called in Ray Train's controller with the metrics that a registered checkpoint commits, and its path.

    Returns:
        The final checkpoint, whose directory :func:`load_state` reads.

    Raises:
        DivergedError: as in :func:`train`.
        UserError: as a worker raised it.
    """
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"make_task": make_task, "payload": payload, "config": config.model_dump()},
        scaling_config=_scaling(config),
        run_config=_run_config(config, folder, on_commit),
    )
    try:
        result: Any = trainer.fit()  # of Ray Train v2, whose class its annotations do not name
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps it, with its traceback as text
            if isinstance(cause, UserError):
                raise cause from error
        raise
    if result.return_value is not None:
        raise DivergedError(result.return_value)
    checkpoint: Checkpoint = result.checkpoint
    return checkpoint


def _run_config(config: TrainConfig, folder: str, on_commit: Callable[[History, str | None], None]) -> Any:
    from ray.train.v2.api import config as ray_train
    from ray.train.v2.api.callback import UserCallback

    class CommitMetrics(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            on_commit(metrics[0]["history"], checkpoint and checkpoint.path)

    storage, name = folder.rstrip("/").rsplit("/", 1)
    return ray_train.RunConfig(
        name=name,
        storage_path=storage,
        checkpoint_config=ray_train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
        failure_config=ray_train.FailureConfig(max_failures=3),
        callbacks=[CommitMetrics()],
        logging_config=ray_train.LoggingConfig(log_level="WARNING"),
    )


def _scaling(config: TrainConfig) -> Any:
    import ray
    import ray.train

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    workers = config.workers or gpus or 1
    # One CPU is left for Ray's own tasks; a worker decodes images on the rest.
    each = max(1, min(8 if gpus else os.cpu_count() or 1, (cpus - 1) // workers))
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker={"CPU": each})


def _train_worker(loop_config: dict[str, Any]) -> Any:
    import ray.train
    from ray.train.torch import get_device, prepare_model

    logging.getLogger().setLevel(logging.WARNING)  # as in the jobs; below it Ray Train prints every report in full
    context = ray.train.get_context()
    # A timm backbone keeps layers for a classifier that is not there; without this DDP refuses the second step.
    wrap = partial(prepare_model, parallel_strategy_kwargs={"find_unused_parameters": True})
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device(), wrap)
    task = loop_config["make_task"](loop_config["payload"], worker.rank, worker.world)
    checkpoint = ray.train.get_checkpoint()
    state = None
    if checkpoint:
        with checkpoint.as_directory() as directory:
            state = load_state(directory)
    try:
        train(task, TrainConfig(**loop_config["config"]), worker, state, _report)
    except DivergedError as error:
        # Returned, not raised: Ray Train would start again from the last checkpoint, into the same loss.
        return str(error)
    return None


def _report(snapshot: Snapshot) -> None:
    import ray.train

    metrics = {"history": snapshot.history}
    if snapshot.state is None:
        ray.train.report(metrics)
        return
    with TemporaryDirectory() as directory:
        torch.save(snapshot.state, Path(directory, STATE_FILE))
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=snapshot.name)
