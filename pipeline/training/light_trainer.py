"""Ray Train with fewer processes: each of its actors takes a second or two of a processor, and 120 MiB or more.

Imports Ray, so it is imported where a training starts, and in Ray Train's controller; and no torch, which the controller of a
single worker need not load.
"""

from collections.abc import Sequence
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LightTrainer(DataParallelTrainer):
    """A trainer without datasets, for a session of one job.

    It does without the manager of datasets, the cleaner of placement groups, which end with the session, and, if the number of
    workers is fixed, without the coordinator that asks an autoscaler for nodes.
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
        """Register no resources."""

    def _maybe_send_resource_request(self) -> None:
        """Send none."""
