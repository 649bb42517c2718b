"""Ray Train around the loop: workers, DDP, checkpoints with retention, elasticity, preemption and SIGTERM.

    <folder>/shares                                   shares of the global batch, fixed when the run starts
    <folder>/checkpoint-<epoch>-<batch>/state.pt      the last `train.keep_checkpoints`, until the run has finished
    <folder>/best/<checkpoint>/state.pt               the best by `train.best_metric`
    <folder>/diverged-step-<step>.pt                  keys, weights and optimiser when the loss was not finite
    <folder>/stop                                     makes the workers save and stop; written on SIGTERM
    <folder>/refused                                  an error that a restart of the worker would repeat

The next start removes `stop` and `refused`. Only functions import Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.runtime import logs
from pipeline.runtime.ray_session import cpus_per_worker, devices, is_cluster, is_in_process
from pipeline.storage.store import Store
from pipeline.training.checkpoint import (
    STATE_FILE,
    Snapshot,
    best_copy_path,
    delete_previous_best,
    load_state,
    open_folder,
)
from pipeline.training.config import TrainConfig, check_shares
from pipeline.training.entry import enter_worker
from pipeline.training.in_process import local_worker, train_in_process
from pipeline.training.loop import train
from pipeline.training.meter import DivergedError
from pipeline.training.stopping import call_in_thread, on_sigterm
from pipeline.training.task import History, Task, map_tensors
from pipeline.training.worker import STOP_REQUESTED, StoppedError, Worker, synchronised

if TYPE_CHECKING:
    from ray.train import Checkpoint

RETRIES = 3
"""Worker failures that a run survives, not counting preempted nodes."""

STOP_FILE, REFUSED_FILE = "stop", "refused"

_ENDINGS: dict[str, type[BaseException]] = {"diverged": DivergedError, "stopped": StoppedError, "refused": UserError}
"""Errors that end a training, by the name that workers return: Ray Train restarts workers that raise."""


def fit(
    make_task: Callable[[dict[str, Any], int, int], Task],
    payload: dict[str, Any],
    config: TrainConfig,
    folder: str,
    on_commit: Callable[[History, str | None], None],
) -> Checkpoint:
    """Train on Ray Train workers, from the last checkpoint in `folder` if there is one.

    On SIGTERM, and before a node is preempted, the workers save a checkpoint within seconds.

    Args:
        make_task: called once per worker with `payload`, the number of its first share and the number of shares.
        folder: of the checkpoints, an absolute path or a URI; all nodes must see it.
        on_commit: called in Ray Train's controller with the metrics and path of each registered checkpoint.

    Returns:
        The final checkpoint; :func:`load_state` reads its directory.

    Raises:
        DivergedError: as in :func:`train`.
        StoppedError: after SIGTERM, once the checkpoint is registered.
        UserError: as raised by a worker, or if the workers cannot share the batch equally.
    """
    shares, store = _shares(config, folder), Store.at(folder)
    for file in (STOP_FILE, REFUSED_FILE):
        store.delete(file)
    stop = partial(store.put, STOP_FILE, b"")
    if is_in_process():
        with on_sigterm(stop), logs.context(stage="train"):
            worker = local_worker(shares, folder, lambda: store.exists(STOP_FILE))
            return train_in_process(make_tasks(make_task, payload, worker), config, worker, folder, on_commit)
    from ray import cloudpickle

    scaling = _scaling(config, shares)
    trainer = _trainer(scaling)(
        enter_worker,
        train_loop_config={
            "task": cloudpickle.dumps((make_task, payload)),
            "config": config.model_dump(include={*TrainConfig.model_fields}),  # a job may have more
            "shares": shares,
            "store": store,
            "log": logs.fields(),
        },
        scaling_config=scaling,
        run_config=_run_config(config, folder, on_commit),
    )
    with on_sigterm(stop):
        try:
            result: Any = call_in_thread(trainer.fit)  # its annotation is the class of Ray Train v1
        except KeyboardInterrupt:
            stop()  # for the workers of a session that stays
            raise
    if result.return_value is not None:
        kind, message = result.return_value
        raise _ENDINGS[kind](message)
    if store.exists(STOP_FILE):  # written after the workers' last check
        raise StoppedError("training was stopped at its end; the same command resumes from there")
    checkpoint: Checkpoint = result.checkpoint
    return checkpoint


def _shares(config: TrainConfig, folder: str) -> int:
    """Shares of the global batch, as recorded in `folder` or for a run that starts now."""
    store = Store.at(folder)
    if store.exists("shares") and (recorded := store.get("shares")):  # empty if an earlier version was killed
        return int(recorded)
    shares = count_shares(config)
    store.put("shares", str(shares).encode())
    return shares


def count_shares(config: TrainConfig) -> int:
    """Shares of the global batch of a run that starts now, one per possible worker; UserError if they do not divide it."""
    shares = config.most_workers or _gpus() or 1
    try:
        check_shares(config.batch_size, shares)
    except ValueError as error:
        raise UserError(str(error)) from None
    return shares


def _gpus() -> int:
    return int(devices()[0])


def _scaling(config: TrainConfig, shares: int) -> Any:
    import ray.train

    gpus = _gpus()
    wanted = config.workers or gpus or 1
    workers: Any  # an int or (least, most); Ray's annotations lack the latter
    if isinstance(wanted, tuple):
        most = min(wanted[1], shares)
        workers = (min(wanted[0], most), most)
    else:
        workers = most = min(wanted, shares)
    each = cpus_per_worker(most, 16 if gpus else os.cpu_count() or 1)
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker={"CPU": each})


def _trainer(scaling: Any) -> Callable[..., Any]:
    """What makes a trainer of Ray Train for these workers."""
    if not is_cluster():
        with contextlib.suppress(ImportError):  # of Ray Train's inner parts, which may be elsewhere in another version
            from pipeline.training.light_trainer import LightTrainer

            if scaling.num_workers == 1 and not scaling.use_gpu:
                return LightTrainer  # without a process group of one
            from ray.train.torch import TorchConfig

            return partial(LightTrainer, backend_config=TorchConfig())
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def _run_config(config: TrainConfig, folder: str, on_commit: Callable[[History, str | None], None]) -> Any:
    from ray.train.v2.api import config as ray_train
    from ray.train.v2.api.callback import UserCallback

    class Commit(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["best"] and checkpoint:
                delete_previous_best(checkpoint.filesystem, checkpoint.path)
            on_commit(metrics[0]["history"], checkpoint and checkpoint.path)

    filesystem, path = open_folder(folder)
    storage, name = path.rsplit("/", 1)
    return ray_train.RunConfig(
        name=name,
        storage_path=storage,
        storage_filesystem=filesystem,
        checkpoint_config=ray_train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
        failure_config=ray_train.FailureConfig(max_failures=RETRIES),
        callbacks=[Commit()],
        logging_config=ray_train.LoggingConfig(log_level="WARNING"),
    )


def train_worker(loop: dict[str, Any]) -> tuple[str, str] | None:
    """Train in a worker of Ray Train; how the training ended, if not at its end (`_ENDINGS`), and the message."""
    import ray.train

    logging.getLogger().setLevel(logging.WARNING)  # as in the jobs; at INFO Ray Train prints every report in full
    logs.configure_worker()
    logs.set_context(**{**loop["log"], "stage": "train"})
    store: Store = loop["store"]
    if store.exists(REFUSED_FILE):
        return "refused", store.get(REFUSED_FILE).decode()
    try:
        _train(loop)
    except DivergedError as error:
        return "diverged", str(error)
    except StoppedError as error:
        return "stopped", str(error)
    except (UserError, torch.OutOfMemoryError) as error:
        reason = _out_of_memory(loop) if isinstance(error, torch.OutOfMemoryError) else str(error)
        if ray.train.get_context().get_world_size() == 1:
            return "refused", reason
        # The other workers wait in a collective: this one fails, and after the restart all of them find the reason.
        store.put(REFUSED_FILE, reason.encode())
        raise
    return None


def _out_of_memory(loop: dict[str, Any]) -> str:
    images = loop["config"]["micro_batch"] or loop["config"]["batch_size"] // loop["shares"]
    return (
        f"the GPU has too little memory for {images} images at once: set train.micro_batch to less, lower train.batch_size, or "
        "train on more GPUs; saved checkpoints are kept"
    )


def _train(loop: dict[str, Any]) -> None:
    import ray.train

    worker = _make_worker(loop["shares"], loop["store"])
    make_task, payload = pickle.loads(loop["task"])  # noqa: S301  from `fit`
    task, *others = make_tasks(make_task, payload, worker)
    checkpoint = ray.train.get_checkpoint()
    state = None
    if checkpoint:
        with checkpoint.as_directory() as directory:
            state = load_state(directory)
    train(task, TrainConfig(**loop["config"]), worker, state, _Reporter(), others)


def make_tasks(
    make_task: Callable[[dict[str, Any], int, int], Task], payload: dict[str, Any], worker: Worker
) -> list[Task]:
    """The tasks of a worker's shares; all use the first one's module."""
    first, *rest = worker.own_shares
    task = make_task(payload, first, worker.all_shares)
    return [task, *(task.with_share(share) for share in rest)]


def _make_worker(shares: int, store: Store) -> Worker:
    import ray.train
    from ray.train.torch import get_device, prepare_model

    context = ray.train.get_context()

    def wrap(module: torch.nn.Module, uses_all_parameters: bool) -> torch.nn.Module:
        # with SyncBN the buffers of all ranks are equal
        options = {"find_unused_parameters": not uses_all_parameters, "broadcast_buffers": not synchronised(alone)}
        wrapped: torch.nn.Module = prepare_model(module, parallel_strategy_kwargs=options)
        return wrapped

    alone = Worker(context.get_world_rank(), context.get_world_size(), get_device())

    def dump(name: str, content: dict[str, Any]) -> str:
        filesystem, path = _in_folder(name)
        with filesystem.open_output_stream(path) as stream:
            torch.save(content, stream)
        return path

    def notice() -> str | None:
        if alone.any_rank(not alone.rank and store.exists(STOP_FILE)):
            return STOP_REQUESTED
        preemption = ray.train.get_preemption_info()
        return str(preemption.preempted_node_ids) if preemption else None

    return Worker(alone.rank, alone.world, alone.device, wrap, shares, notice, dump)


def _in_folder(name: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a file in the folder of the checkpoints."""
    import ray.train

    storage = ray.train.get_context().get_storage()
    return storage.storage_filesystem, storage.build_checkpoint_path_from_name(name)


class _Reporter:
    """Commits snapshots while training continues: copies them to the CPU, and a thread writes and registers them.

    At most one copy waits to be written, so that memory stays bounded.
    """

    def __init__(self) -> None:
        self.written = threading.Semaphore()

    def __call__(self, snapshot: Snapshot) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode

        metrics = {"history": snapshot.history, "best": snapshot.best}
        mode = CheckpointUploadMode.ASYNC
        if snapshot.state is None:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        self.written.acquire()
        state = map_tensors(snapshot.state, lambda tensor: tensor.detach().to("cpu", copy=True))
        filesystem, path = _in_folder(snapshot.name)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(path, filesystem),
            checkpoint_dir_name=snapshot.name,
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=partial(self._write, state, snapshot.best),
        )

    def _write(self, state: dict[str, Any], best: bool, checkpoint: Any, _: str) -> Checkpoint:
        # Ray Train's retention keeps the latest or the best checkpoints, not both. The copy comes first: after a crash, a run
        # that resumes from a registered checkpoint does not check again whether it is the best.
        paths = [best_copy_path(checkpoint.path), checkpoint.path] if best else [checkpoint.path]
        try:
            for path in paths:
                checkpoint.filesystem.create_dir(path, recursive=True)
                with checkpoint.filesystem.open_output_stream(f"{path}/{STATE_FILE}") as stream:
                    torch.save(state, stream)
        finally:
            self.written.release()
        return checkpoint
