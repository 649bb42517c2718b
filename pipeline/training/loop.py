"""The training loop: epochs, positions, evaluation, divergence. Imports neither Ray nor MLflow."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError, one_line
from pipeline.runtime.allocator import keep_freed_memory
from pipeline.runtime.interpreter import launch_promptly
from pipeline.runtime.prefetch import map_ahead
from pipeline.runtime.progress import Progress
from pipeline.training.checkpoint import Snapshot, TrainingPosition
from pipeline.training.config import TrainConfig
from pipeline.training.meter import DivergedError, Meter, Pace, data_bound
from pipeline.training.step import Stepper
from pipeline.training.task import History, Task, check_best_metric, list_tensors, to_device
from pipeline.training.worker import STOP_REQUESTED, StoppedError, Worker

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

SECONDS_BETWEEN_NOTICES = 5.0
"""Seconds between checks for a notice to save or stop."""


def train(
    task: Task,
    config: TrainConfig,
    worker: Worker,
    state: dict[str, Any] | None,
    commit: Callable[[Snapshot], None],
    others: Sequence[Task] = (),
) -> None:
    """Train from `state` (or from the start) to the last epoch.

    Args:
        task: of this worker's first share of the global batch; its module is trained.
        commit: called on every rank at each checkpoint; the first holds the evaluation before training.
        others: tasks of the worker's further shares; only their batches are used.

    Raises:
        DivergedError: if the loss is not finite; the message names the first such batch and the file with the states.
        StoppedError: after `worker.notice` returned `STOP_REQUESTED` and everything was committed.
        UserError: if `train.best_metric` is not evaluated, or `state` is of another training.
    """
    keep_freed_memory()
    if worker.device.type == "cuda":
        launch_promptly()
    loop = _Loop(task, config, worker, commit, others)
    if state is None:
        loop.evaluate()
        loop.commit()
    else:
        loop.restore(state)
    try:
        while loop.position.epoch < config.epochs:
            loop.run_epoch()
        if loop.history:  # the previous process died before logging the last metrics
            commit(Snapshot(loop.position.name, None, loop.history))
    except DivergedError as error:
        raise loop.dumped(error) from error


class _Loop:
    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        worker: Worker,
        commit: Callable[[Snapshot], None],
        others: Sequence[Task],
    ) -> None:
        self.task, self.config, self.worker, self.on_commit = task, config, worker, commit
        self.tasks = [task, *others]
        task.worker = worker
        steps = [task.steps(epoch) for epoch in range(config.epochs)]
        self.all_steps = sum(steps)
        self.stepper = Stepper(task, config, worker, steps)
        self.position, self.pace = TrainingPosition(), Pace()
        self.evaluations: History = []
        self.history: History = []
        self.best = False
        self.handled_notice: str | None = None
        if not worker.rank:
            print(f"learning rate {config.lr_rule}", flush=True)
            if self.stepper.compiled:
                print("the first step compiles student and loss, which takes minutes", flush=True)

    def restore(self, state: dict[str, Any]) -> None:
        try:
            self.stepper.restore(state)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # RuntimeErrors that the checkpoint does not cause
        except (KeyError, RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise UserError(
                f"the checkpoint of step {state['position']['step']} belongs to another training; an older version of the code "
                f"may have written it ({reason}): remove the folder of the run, and the same command restarts the training from "
                "the cache, which is kept"
            ) from error
        self.position = TrainingPosition(**state["position"])
        self.evaluations = [(step, metrics) for step, metrics in state["evaluations"]]
        self.history = list(state.get("history", []))

    def state(self) -> dict[str, Any]:
        return {**self.stepper.state(), "position": asdict(self.position), "evaluations": list(self.evaluations)}

    def commit(self) -> None:
        history, self.history = self.history, []
        best, self.best = self.best, False
        state = None if self.worker.rank else {**self.state(), "history": history}
        self.on_commit(Snapshot(self.position.name, state, history, best))

    def evaluate(self) -> None:
        averaged, step = self.stepper.average.module, self.position.step
        raw = self.stepper.module.eval() if step else None
        for module in (averaged, raw) if raw else (averaged,):
            self.worker.broadcast_state(module)
        metrics = self.task.evaluate(averaged, raw)
        if self.worker.rank:
            return
        self.best = self._is_best(metrics)
        self.evaluations.append((step, metrics))
        self.history.append((step, metrics))
        if metrics:
            # metrics by teacher, `val_loss/...`, are for the curves only
            printed = {name: value for name, value in metrics.items() if "/" not in name} or metrics
            shown = "  ".join(f"{name} {value:.4g}" for name, value in printed.items())
            print(f"evaluated at step {step}  {shown}", flush=True)
        self.task.draw(averaged, self.evaluations)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        check_best_metric(self.config.best_metric, metrics)
        name = self.config.best_metric or self.task.headline
        if name not in metrics:
            return False
        sign = -1 if self.config.best_is == "lowest" else 1
        return all(sign * metrics[name] > sign * earlier[name] for _, earlier in self.evaluations if name in earlier)

    def run_epoch(self) -> None:
        position, config = self.position, self.config
        steps = self.task.steps(position.epoch)
        meter = Meter(self.worker, steps, self.pace, finite_gradient=not self.stepper.half)
        self.stepper.wrapped.train()
        label = f"train epoch {position.epoch + 1}/{config.epochs}"
        device = self.worker.device
        with Progress(steps, "step", label, initial=position.batch) as progress:
            feeds = [prefetch_to_device(task.batches(position.epoch, position.batch), device) for task in self.tasks]
            for _ in range(steps - position.batch):
                with meter.clock.waiting():
                    batches = [next(feed) for feed in feeds]
                meter.add(batches, self.stepper(batches, position.step, meter.clock))
                position.step, position.batch = position.step + 1, position.batch + 1
                position.samples += len(batches[0].keys) * self.worker.all_shares
                if meter.due:
                    self._log(meter, steps)
                if not self.worker.rank:
                    progress.update(1, **meter.postfix(self.all_steps - position.step))
                self._save_when_due(meter, steps)
        if not self.worker.rank and device.type == "cuda" and meter.latest and (reason := data_bound(meter.latest)):
            log.warning(reason)
        position.epoch, position.batch = position.epoch + 1, 0
        self.evaluate()
        self.commit()

    def _log(self, meter: Meter, steps: int) -> None:
        position = self.position
        if metrics := meter.read(position.step):
            where = {
                "learning_rate": self.stepper.optimizer.param_groups[0]["lr"],
                "samples_seen": position.samples,
                "epoch": position.epoch + position.batch / max(1, steps),
            }
            self.history.append((position.step, {**metrics, **where}))

    def _save_when_due(self, meter: Meter, steps: int) -> None:
        """Save at the end of an epoch too, before its evaluation: a preempted node may not live to finish it."""
        every, step = self.config.checkpoint_steps, self.position.step
        notice = self._notice(meter)
        if notice or self.position.batch == steps or (every and step % every == 0):
            self._log(meter, steps)
            self.commit()
        if notice == STOP_REQUESTED:
            raise StoppedError(f"training was stopped at step {step}; the same command resumes from there")

    def _notice(self, meter: Meter) -> str | None:
        """A new notice; every rank checks after the same number of steps."""
        seconds = meter.seconds_per_step
        every = meter.every if seconds is None else max(1, int(SECONDS_BETWEEN_NOTICES / max(seconds, 1e-9)))
        if self.position.step % every:
            return None
        notice = self.worker.notice()
        fresh = notice if notice != self.handled_notice else None
        self.handled_notice = notice
        return fresh

    def dumped(self, error: DivergedError) -> DivergedError:
        """The error, with the file that holds the states for a diagnosis."""
        content = {**self.state(), "diverged": {"step": error.step, "keys": error.keys, "message": str(error)}}
        file = None if self.worker.rank else self.worker.dump(f"diverged-step-{error.step:08d}.pt", content)
        state = f"weights and optimiser state of step {self.position.step}"
        where = f"; its keys, and {state}, are in {file}" if file else ""
        return DivergedError(f"{error}{where}", error.step, error.keys)


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with all their tensors on `device`.

    A thread copies them to a GPU one batch ahead on a side stream: on the training stream, a copy from pageable memory
    would wait for the previous step, and the next step for the copy.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def upload(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            moved: Batch = to_device(batch, device)
        stream.synchronize()
        return moved

    with ThreadPoolExecutor(1) as pool:
        for batch in map_ahead(pool, upload, batches, ahead=1):
            for tensor in list_tensors(batch):
                tensor.record_stream(torch.cuda.current_stream(device))  # or its memory is reused too early
            yield batch
