"""What Ray Train starts in an embedded session."""

import pickle

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.training.light_trainer import LightTrainer, _FixedWorkers
from pipeline.training.ray_train import _trainer


@pytest.mark.parametrize(("workers", "fixed"), [(1, True), ((1, 2), False)])
def test_the_controller_gets_nothing_that_starts_an_actor_for_others(monkeypatch, tmp_path, workers, fixed):
    given = {}
    for module, name in ((worker_group, "SynchronizationActor"), (state, "_shutdown_sync_actor")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", lambda _, **names: given.update(names))
    scaling = ScalingConfig(num_workers=workers)
    trainer = LightTrainer(print, scaling_config=scaling, run_config=RunConfig("x", storage_path=str(tmp_path)))
    usual = trainer._create_default_callbacks()
    policy = create_scaling_policy(scaling)
    trainer._initialize_and_run_controller(callbacks=usual, scaling_policy=policy, train_fn_ref="kept")
    left, right = ({type(one).__name__ for one in some} for some in (usual, given["callbacks"]))
    assert left - right == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    (own,) = (one for one in given["callbacks"] if type(one).__name__ == "_NoDatasets")
    assert own.before_init_train_context(["a", "b"]) == {"dataset_shard_provider": [None, None]}
    assert given["train_fn_ref"] == "kept"
    assert (given["scaling_policy"] is not policy) is fixed
    if fixed:
        given["scaling_policy"].after_controller_start(None)  # asks no coordinator, for which it would need a session
        given["scaling_policy"].make_decision_for_non_running_worker_group()
        given["scaling_policy"].before_controller_abort()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_single_worker_agrees_with_itself_without_an_actor(monkeypatch, workers):
    theirs = worker_group.SynchronizationActor
    for module, name in ((worker_group, "SynchronizationActor"), (state, "_shutdown_sync_actor")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(ray, "put", lambda value: ("reference", value))
    policy = create_scaling_policy(ScalingConfig(num_workers=workers))
    _FixedWorkers(policy.scaling_config).after_controller_start(None)
    assert (worker_group.SynchronizationActor is theirs) is (workers > 1)
    if workers == 1:
        actor = worker_group.SynchronizationActor.options(label_selector={}).remote(timeout_s=1)
        shared = pickle.loads(pickle.dumps(actor))  # noqa: S301  it goes to the worker
        said = shared.broadcast_from_rank_zero.remote(
            world_rank=0, world_size=1, data="name", caller_method_name="report"
        )
        assert said == ("reference", "name")
        state._shutdown_sync_actor(actor)


def test_a_single_worker_without_a_gpu_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _trainer(ScalingConfig(num_workers=1)) is LightTrainer
    for scaling in (ScalingConfig(num_workers=2), ScalingConfig(num_workers=1, use_gpu=True)):
        assert type(_trainer(scaling).keywords["backend_config"]).__name__ == "TorchConfig"
    monkeypatch.setenv("RAY_ADDRESS", "a-cluster:6379")
    assert _trainer(ScalingConfig(num_workers=1)).__name__ == "TorchTrainer"
