"""Training in the driver's own process."""

import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.runtime.ray_session import connect
from pipeline.training.checkpoint import load_state
from pipeline.training.meter import DivergedError
from pipeline.training.ray_train import STOP_FILE, fit
from pipeline.training.worker import StoppedError
from tests.training.engine import CHECKPOINTS, PLAIN, assert_equal_states, run_training, train_config
from tests.training.tiny_task import STEPS, TinyTask, lines, make_tiny_task


@pytest.fixture
def start(tmp_path):
    """Start the training of a folder in this process; gives the last state, and what was committed."""

    def start(name="first", commit=lambda history, checkpoint: None, **task):
        (tmp_path / name).mkdir()
        committed = []

        def note(history, checkpoint):
            committed.append(([step for step, metrics in history if "loss" in metrics], checkpoint))
            commit(history, checkpoint)

        config = train_config(checkpoint_steps=4, best_metric="score", batch_size=2)
        with connect(in_process=True):
            checkpoint = fit(
                make_tiny_task, {"folder": str(tmp_path / name), **task}, config, str(tmp_path / "train"), note
            )
        with checkpoint.as_directory() as directory:
            return SimpleNamespace(state=load_state(directory), committed=committed)

    return start


def test_in_process_every_step_is_committed_once_and_the_latest_and_the_best_checkpoints_are_kept(start, tmp_path):
    ended = start()
    assert [step for steps, _ in ended.committed for step in steps] == list(range(1, 3 * STEPS + 1))
    assert [Path(checkpoint).name for _, checkpoint in ended.committed] == CHECKPOINTS
    left = {path.name for path in (tmp_path / "train").iterdir()}
    assert left == {"shares", "best", *CHECKPOINTS[-2:]}
    scores = [metrics["score"] for _, metrics in ended.state["evaluations"]]
    (best,) = (tmp_path / "train" / "best").iterdir()
    assert best.name == f"checkpoint-000{scores.index(max(scores))}-000000"


def test_in_process_training_gives_what_the_loop_gives(start):
    assert_equal_states(start(folder="").state, run_training(TinyTask(), train_config(batch_size=2))[-1].state)


def test_in_process_a_second_start_resumes_from_the_newest_checkpoint(start, tmp_path):
    def fail(history, checkpoint):
        if checkpoint and checkpoint.endswith(CHECKPOINTS[4]):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        start(commit=fail)
    (tmp_path / "train" / CHECKPOINTS[5]).mkdir()  # a process that ended while it wrote this one
    (tmp_path / "train" / CHECKPOINTS[5] / "state.pt.part").write_bytes(b"half")
    there = {path.parent.name for path in (tmp_path / "train").glob("checkpoint-*/state.pt")}
    resumed = start("second")
    assert {path.parent.name for path in (tmp_path / "train").glob("checkpoint-*/state.pt")} >= there
    assert lines(tmp_path / "second", "batches")[0] == "1/2"
    assert_equal_states(resumed.state, run_training(TinyTask(), train_config(batch_size=2))[-1].state)
    assert start("third").committed == [([], None)]  # the metrics of the last checkpoint are logged again
    assert not (tmp_path / "third" / "batches-0").exists()


def test_in_process_one_worker_takes_all_shares_of_a_run_that_was_started_with_more(start, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shares").write_text("2")
    start(**PLAIN)
    whole = [f"{epoch}/{number}" for epoch in range(3) for number in range(STEPS)]
    assert [lines(tmp_path / "first", "batches", share) for share in range(2)] == [whole] * 2


def test_in_process_a_stop_saves_and_ends_the_training(start, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.05)

    def stop(history, checkpoint):
        if checkpoint and checkpoint.endswith(CHECKPOINTS[1]):
            (tmp_path / "train" / STOP_FILE).touch()

    with pytest.raises(StoppedError, match="training was stopped at step"):
        start(commit=stop, delay=0.05)
    assert start("second").state["position"]["step"] == 3 * STEPS


def test_in_process_divergence_leaves_keys_and_states(start, tmp_path):
    with pytest.raises(DivergedError, match="nan at step 6; the batch holds e0-b5-r0-0"):
        start(poison={0: 5})
    assert torch.load(tmp_path / "train" / "diverged-step-00000006.pt", weights_only=True)["diverged"]["step"] == 6


def test_in_process_an_error_keeps_its_traceback(start):
    with pytest.raises(ZeroDivisionError) as raised:
        start(delay=Divides())
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == "__index__"


class Divides:
    """A number of seconds that cannot be computed."""

    def __index__(self):
        return 1 // 0
