"""Ray Train with fewer processes: each of its actors takes a second or two of a processor, and 120 MiB or more.

Imports Ray, so it is imported where a training starts.
"""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import ray
from ray.runtime_context import RuntimeContext
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.runtime.ray_session import before_shutdown
from pipeline.runtime.replaced import replaced

PATIENCE_S = 10.0
"""How long the end of a session waits for the controller, which may be waiting for new workers."""


class LightTrainer(DataParallelTrainer):
    """A trainer without datasets, for a session of one job.

    The controller runs in the thread that calls `fit`. There is no manager of datasets, no cleaner of placement groups, which end
    with the session, and, if the number of workers is fixed, no coordinator that asks an autoscaler for nodes. A single worker
    has no actor that waits for the reports of all workers.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [one for one in arguments["callbacks"] if not isinstance(one, needless)]
        policy = arguments["scaling_policy"]
        if type(policy) is FixedScalingPolicy:
            policy = _FixedWorkers(policy.scaling_config)
        arguments |= {"callbacks": [_NoDatasets(), *kept], "scaling_policy": policy}
        with _reports_alone() if self.scaling_config.num_workers == 1 else nullcontext():
            controller = _Controller(**arguments)
            asyncio.run(_run(controller))
            return controller.get_result()


async def _run(controller: TrainController) -> None:
    """Run a controller until it has finished, or the session is to end."""
    loop, task, ended = asyncio.get_running_loop(), asyncio.current_task(), threading.Event()
    assert task

    def end() -> None:
        with suppress(RuntimeError):  # the loop is closed: it has just finished
            loop.call_soon_threadsafe(task.cancel)
        ended.wait(PATIENCE_S)

    with before_shutdown(end):
        try:
            await controller.run()
        finally:
            ended.set()


class _Workers(WorkerGroup):
    def _init_train_context_on_workers(self, *arguments: Any) -> None:
        # Only an actor has a handle for workers that ask for all checkpoints so far; ours do not.
        with replaced((RuntimeContext, "current_actor", None)):
            super()._init_train_context_on_workers(*arguments)


class _Controller(TrainController):
    worker_group_cls = _Workers


class _NoDatasets(WorkerGroupCallback):
    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[None]]:
        return {"dataset_shard_provider": [None] * len(workers)}


class _FixedWorkers(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        """Register no resources."""

    def _maybe_send_resource_request(self) -> None:
        """Send none."""


def _reports_alone() -> AbstractContextManager[None]:
    """Let worker groups of this process have no actor for what their workers agree on."""
    return replaced((worker_group, "SynchronizationActor", _Alone()), (state, "_shutdown_sync_actor", lambda _: None))


class _Echo:
    def remote(self, *, data: Any, **_: Any) -> Any:
        return ray.put(data)


class _Alone:
    """Stands for the class of that actor and for its handle: what all workers have agreed on is what the only one says."""

    broadcast_from_rank_zero = _Echo()

    def options(self, **_: Any) -> Any:
        return self

    def remote(self, **_: Any) -> Any:
        return self
