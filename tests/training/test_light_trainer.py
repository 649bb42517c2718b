"""What Ray Train starts in an embedded session."""

import pickle

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group

from pipeline.training import light_trainer
from pipeline.training.light_trainer import LightTrainer, _Controller, _reports_alone
from pipeline.training.ray_train import _trainer


@pytest.mark.parametrize(("workers", "fixed"), [(1, True), (2, True), ((1, 2), False)])
def test_the_controller_gets_nothing_that_starts_an_actor_for_others(monkeypatch, tmp_path, workers, fixed):
    class Controller:
        def __init__(self, **names):
            given.update(names, synchroniser=worker_group.SynchronizationActor)

        async def run(self):
            given["ran"] = True

        def get_result(self):
            return "result"

    given, theirs = {}, worker_group.SynchronizationActor
    monkeypatch.setattr(light_trainer, "_Controller", Controller)
    scaling = ScalingConfig(num_workers=workers)
    trainer = LightTrainer(print, scaling_config=scaling, run_config=RunConfig("x", storage_path=str(tmp_path)))
    usual = trainer._create_default_callbacks()
    policy = create_scaling_policy(scaling)
    result = trainer._initialize_and_run_controller(callbacks=usual, scaling_policy=policy, train_fn_ref="kept")
    assert (result, given["ran"], given["train_fn_ref"]) == ("result", True, "kept")
    left, right = ({type(one).__name__ for one in some} for some in (usual, given["callbacks"]))
    assert left - right == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    (own,) = (one for one in given["callbacks"] if type(one).__name__ == "_NoDatasets")
    assert own.before_init_train_context(["a", "b"]) == {"dataset_shard_provider": [None, None]}
    assert (given["synchroniser"] is not theirs) is (workers == 1)
    assert worker_group.SynchronizationActor is theirs  # for a later training of this process
    assert (given["scaling_policy"] is not policy) is fixed
    if fixed:
        given["scaling_policy"].after_controller_start(None)  # asks no coordinator, for which it would need a session
        given["scaling_policy"].make_decision_for_non_running_worker_group()
        given["scaling_policy"].before_controller_abort()


def test_a_single_worker_agrees_with_itself_without_an_actor(monkeypatch):
    monkeypatch.setattr(ray, "put", lambda value: ("reference", value))
    with _reports_alone():
        actor = worker_group.SynchronizationActor.options(label_selector={}).remote(timeout_s=1)
        shared = pickle.loads(pickle.dumps(actor))  # noqa: S301  it goes to the worker
        said = shared.broadcast_from_rank_zero.remote(
            world_rank=0, world_size=1, data="name", caller_method_name="report"
        )
        assert said == ("reference", "name")
        state._shutdown_sync_actor(actor)


def test_workers_get_no_handle_of_a_controller_that_is_no_actor(monkeypatch):
    monkeypatch.setattr(
        WorkerGroup, "_init_train_context_on_workers", lambda *_: ray.get_runtime_context().current_actor
    )
    group = object.__new__(_Controller.worker_group_cls)
    assert group._init_train_context_on_workers([], None, {}) is None  # it would raise in a driver


def test_a_single_worker_without_a_gpu_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _trainer(ScalingConfig(num_workers=1)) is LightTrainer
    for scaling in (ScalingConfig(num_workers=2), ScalingConfig(num_workers=1, use_gpu=True)):
        assert type(_trainer(scaling).keywords["backend_config"]).__name__ == "TorchConfig"
    monkeypatch.setenv("RAY_ADDRESS", "a-cluster:6379")
    assert _trainer(ScalingConfig(num_workers=1)).__name__ == "TorchTrainer"
