"""Notices to save or stop during training."""

import pytest

from pipeline.training.loop import train
from pipeline.training.worker import STOP_REQUESTED, StoppedError, Worker
from tests.training.engine import assert_equal_states, keep_snapshots, losses_of, run_training, train_config
from tests.training.tiny_task import STEPS, TinyTask

AFTER_NOTICES = ("0-000000", "0-000002", "0-000004", "0-000006", "1-000000", "1-000006", "2-000000")


def test_a_notice_saves_once_and_training_goes_on(monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots = iter([None, "node a", "node a", "node b", *[None] * 99]), []
    train(TinyTask(), train_config(epochs=2), Worker(notice=lambda: next(notices)), None, keep_snapshots(snapshots))
    names = [snapshot.name for snapshot in snapshots]
    assert names == [f"checkpoint-000{at}" for at in AFTER_NOTICES]


def test_after_the_notice_to_stop_a_second_start_ends_as_an_uninterrupted_run(whole, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots = iter([None] * 9 + [STOP_REQUESTED]), []
    with pytest.raises(StoppedError, match="stopped at step 10; the same command resumes from there"):
        train(TinyTask(), train_config(), Worker(notice=lambda: next(notices)), None, keep_snapshots(snapshots))
    assert snapshots[-1].name == "checkpoint-0001-000004"
    rest = run_training(TinyTask(), train_config(), snapshots[-1].state)
    assert_equal_states(rest[-1].state, whole[-1].state)
    assert [step for step, _ in losses_of(snapshots[:-1] + rest)] == list(range(1, 3 * STEPS + 1))


def test_after_the_notice_to_stop_at_the_end_of_an_epoch_its_evaluation_waits_for_the_second_start(whole, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.SECONDS_BETWEEN_NOTICES", 0.0)
    notices, snapshots, task = iter([None] * 5 + [STOP_REQUESTED]), [], TinyTask()
    with pytest.raises(StoppedError, match="stopped at step 6; the same command resumes from there"):
        train(task, train_config(), Worker(notice=lambda: next(notices)), None, keep_snapshots(snapshots))
    assert snapshots[-1].name == "checkpoint-0000-000006"
    assert len(task.judged) == 1
    assert (
        run_training(TinyTask(), train_config(), snapshots[-1].state)[-1].state["evaluations"]
        == whole[-1].state["evaluations"]
    )
