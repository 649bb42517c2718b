"""Ray Train with fewer processes: each of its actors takes a second or two of a processor, and 120 MiB or more.

Imports Ray, so it is imported where a training starts, and in Ray Train's controller; and no torch, which the controller of a
single worker need not load.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LightTrainer(DataParallelTrainer):
    """A trainer without datasets, for a session of one job.

    It does without the manager of datasets, the cleaner of placement groups, which end with the session, and, if the number of
    workers is fixed, without the coordinator that asks an autoscaler for nodes. A single worker has no actor that waits for the
    reports of all workers.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [one for one in arguments["callbacks"] if not isinstance(one, needless)]
        policy = arguments["scaling_policy"]
        if type(policy) is FixedScalingPolicy:
            policy = _FixedWorkers(policy.scaling_config)
        changed = {"callbacks": [_NoDatasets(), *kept], "scaling_policy": policy}
        return super()._initialize_and_run_controller(**{**arguments, **changed})


class _NoDatasets(WorkerGroupCallback):
    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[None]]:
        return {"dataset_shard_provider": [None] * len(workers)}


class _FixedWorkers(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        """Register no resources; called in the controller before it starts workers."""
        if self.scaling_config.num_workers == 1:
            _report_alone()

    def _maybe_send_resource_request(self) -> None:
        """Send none."""


def _report_alone() -> None:
    """Let the worker groups of this process, a controller, have no actor for what their workers agree on."""
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    names = {worker_group: "SynchronizationActor", state: "_shutdown_sync_actor"}
    if all(hasattr(module, name) for module, name in names.items()):
        setattr(worker_group, names[worker_group], _Alone())
        setattr(state, names[state], lambda _: None)


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
