"""The loop on Ray Train workers."""

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.runtime import ray_session
from pipeline.training.checkpoint import load_state
from pipeline.training.meter import DivergedError
from pipeline.training.ray_train import _out_of_memory, _shares, _trainer, fit
from tests.training.engine import CHECKPOINTS, PLAIN, run_training, train_config
from tests.training.tiny_task import BATCH, STEPS, WholeBatches, lines, make_tiny_task

SHARES = 3


def _two_starts(folder, **settings):
    """Two starts of a run that began with three workers: two of them, stopped by a NaN of the second, then one."""
    backend = "aot_eager" if settings else ""
    (folder / "train").mkdir()
    (folder / "train" / "shares").write_text(str(SHARES))

    def commit(history, checkpoint):
        """Runs in Ray Train's controller."""
        steps = [step for step, metrics in history if "loss" in metrics]
        with (folder / "committed").open("a") as file:
            file.write(json.dumps([steps, checkpoint]) + "\n")

    def start(name, workers, **task):
        (folder / name).mkdir()
        payload = {"folder": str(folder / name), "backend": backend, **PLAIN, **task}
        config = train_config(workers=workers, checkpoint_steps=4, best_metric="score", **settings)
        checkpoint = fit(make_tiny_task, payload, config, str(folder / "train"), commit)
        with checkpoint.as_directory() as directory:
            return load_state(directory)

    with pytest.raises(DivergedError) as diverged:
        start("diverged", 2, poison={1: 5})
    return SimpleNamespace(folder=folder, error=str(diverged.value), state=start("resumed", 1))


@pytest.fixture(scope="module")
def ray_runs(ray_session, tmp_path_factory):
    return _two_starts(tmp_path_factory.mktemp("ray"))


@pytest.mark.slow
def test_on_ray_a_loss_that_is_not_finite_stops_all_workers_and_names_its_batch(ray_runs):
    assert "nan at step 6; the batch holds e0-b5-r1-0" in ray_runs.error


@pytest.mark.slow
def test_on_ray_a_worker_of_two_shares_makes_one_task(ray_runs):
    made = {file.name: file.read_text().split() for file in (ray_runs.folder / "diverged").glob("made-*")}
    assert made == {"made-0": ["made"], "made-1": ["made"]}


@pytest.mark.slow
def test_on_ray_a_second_start_goes_on_from_the_last_checkpoint(ray_runs):
    whole = [f"{epoch}/{number}" for epoch in range(3) for number in range(STEPS)]
    resumed = ray_runs.folder / "resumed"
    assert [lines(resumed, "batches", share) for share in range(SHARES)] == [whole[4:]] * SHARES
    samples = 3 * STEPS * SHARES * BATCH
    assert ray_runs.state["position"] == {"epoch": 3, "batch": 0, "step": 3 * STEPS, "samples": samples}


@pytest.mark.slow
def test_on_ray_divergence_leaves_keys_and_states_in_the_folder_of_the_checkpoints(ray_runs):
    file = ray_runs.folder / "train" / "diverged-step-00000006.pt"
    assert str(file) in ray_runs.error
    content = torch.load(file, weights_only=True)
    assert content["diverged"]["keys"] == [f"e0-b5-r1-{number}" for number in range(BATCH)]
    assert all(torch.isfinite(value).all() for value in content["model"].values())


@pytest.mark.slow
def test_on_ray_the_best_and_the_latest_checkpoints_are_kept(ray_runs):
    evaluations = ray_runs.state["evaluations"]
    best = max(range(len(evaluations)), key=lambda number: evaluations[number][1]["score"])
    (kept,) = (ray_runs.folder / "train" / "best").iterdir()
    assert kept.name == f"checkpoint-000{best}-000000"
    assert load_state(kept)["position"]["step"] == evaluations[best][0]


@pytest.mark.slow
def test_on_ray_every_step_is_committed_once_with_its_checkpoint(ray_runs):
    committed = [json.loads(line) for line in (ray_runs.folder / "committed").read_text().splitlines()]
    said = [step for steps, _ in committed for step in steps]
    assert said == list(range(1, 5)) + list(
        range(1, 3 * STEPS + 1)
    )  # the second start says again what it finds committed
    assert [Path(checkpoint).name for _, checkpoint in committed] == CHECKPOINTS
    kept = [checkpoint for _, checkpoint in committed if Path(checkpoint).exists()]
    assert [Path(checkpoint).name for checkpoint in kept] == CHECKPOINTS[-2:]
    assert [load_state(checkpoint)["position"]["step"] for checkpoint in kept] == [18, 18]


@pytest.mark.slow
def test_on_ray_workers_of_unequal_shares_hold_equal_weights(ray_runs):
    # Rank 0 writes them down twice a step, for its two shares; so does rank 1, whose share is cut in two.
    first, second = (lines(ray_runs.folder / "diverged", "weights", rank) for rank in (0, 1))
    assert first == second
    assert len(first) == 2 * STEPS
    assert len(set(first)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_on_ray_two_workers_and_then_one_train_as_one_on_all_batches(compiled, ray_runs, tmp_path):
    runs = _two_starts(tmp_path, compile=True) if compiled else ray_runs
    whole = run_training(WholeBatches(world=SHARES, **PLAIN), train_config())[-1].state
    for part in ("model", "ema"):
        torch.testing.assert_close(runs.state[part], whole[part], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_what_one_worker_refuses_ends_the_training_after_one_more_start(tmp_path):
    payload = {"folder": str(tmp_path), "refused_by": 1, **PLAIN}
    with pytest.raises(UserError, match=r"^shard 7 is not as it should be$"):
        fit(make_tiny_task, payload, train_config(workers=2), str(tmp_path / "train"), lambda history, checkpoint: None)
    assert [lines(tmp_path, "made", rank) for rank in (0, 1)] == [["made"], ["made"]]


def test_a_controller_in_a_thread_ends_before_its_session_does():
    from pipeline.training import light_trainer

    started = threading.Event()

    class Controller:
        async def run(self):
            started.set()
            await asyncio.sleep(60)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, light_trainer._run(Controller()))
        assert started.wait(10)
        (end,) = ray_session._before_shutdown
        end()
        assert ray_session._before_shutdown == []
        assert isinstance(running.exception(10), asyncio.CancelledError)


def test_a_ray_train_of_other_inner_parts_has_its_own_trainer(monkeypatch):
    from ray.train.torch import TorchTrainer

    scaling = SimpleNamespace(num_workers=1, use_gpu=False)
    assert _trainer(scaling).__name__ == "LightTrainer"
    monkeypatch.setitem(sys.modules, "pipeline.training.light_trainer", None)  # importing it fails
    assert _trainer(scaling) is TorchTrainer


@pytest.mark.parametrize(("micro", "images"), [(None, 64), (16, 16)])
def test_out_of_memory_names_the_number_of_images(micro, images):
    config = train_config(batch_size=256, micro_batch=micro).model_dump()
    assert f"for {images} images at once: set train.micro_batch" in _out_of_memory({"config": config, "shares": 4})


def test_a_run_keeps_the_shares_that_it_started_with(tmp_path):
    folder = str(tmp_path / "train")
    assert _shares(train_config(batch_size=12, workers=(1, 4)), folder) == 4
    assert _shares(train_config(batch_size=12, workers=2), folder) == 4
    with pytest.raises(UserError, match=r"train.batch_size=12 cannot be shared equally by 5 workers; 10 or 15 can"):
        load_config(DistillJobConfig, None, ["train.batch_size=12", "train.workers=[1, 5]"])
