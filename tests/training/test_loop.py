"""Checkpoints, resumption, evaluation and the best checkpoint of the plain loop."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.loop import train
from pipeline.training.worker import Worker
from tests.training.engine import (
    CHECKPOINTS,
    assert_equal_states,
    history_of,
    run_training,
    train_config,
    without_times,
)
from tests.training.tiny_task import BATCH, STEPS, TinyTask


def test_checkpoints_are_committed_before_training_within_epochs_and_at_their_ends(whole):
    assert [snapshot.name for snapshot in whole] == CHECKPOINTS == sorted(CHECKPOINTS)
    assert whole[4].state["position"] == {"epoch": 1, "batch": 2, "step": 8, "samples": 8 * BATCH}


@pytest.mark.parametrize("survived", range(1, len(CHECKPOINTS)))
def test_an_interrupted_run_ends_as_one_that_was_not(whole, survived):
    rest = run_training(TinyTask(), train_config(checkpoint_steps=4), whole[survived - 1].state)
    assert [snapshot.name for snapshot in rest] == [snapshot.name for snapshot in whole[survived:]]
    assert_equal_states(rest[-1].state, whole[-1].state)
    assert rest[-1].state["evaluations"] == whole[-1].state["evaluations"]
    both = history_of(whole[: survived - 1]) + history_of(
        rest
    )  # the last interval is said again, as nobody may have heard it
    assert [(step, without_times(metrics)) for step, metrics in both] == [
        (step, without_times(metrics)) for step, metrics in history_of(whole)
    ]


def test_a_state_of_another_training_is_refused(whole):
    state = whole[4].state
    groups = state["optimizer"]["param_groups"]
    for part, other in (("optimizer", {"state": {}, "param_groups": groups[1:]}), ("model", {}), ("ema", {})):
        with pytest.raises(
            UserError, match=r"of step 8 belongs to another training.*: remove the folder of the run, and"
        ):
            run_training(TinyTask(), train_config(), {**state, part: other})


def test_a_finished_run_does_nothing_more(whole):
    task = TinyTask()
    (left,) = run_training(task, train_config(checkpoint_steps=4), whole[-1].state)
    assert task.judged == []
    assert (left.state, left.history) == (None, whole[-1].history)  # which nobody may have lived to log


def test_the_optimizer_is_part_of_a_checkpoint(whole):
    rest = run_training(
        TinyTask(), train_config(checkpoint_steps=4), {**whole[2].state, "optimizer": whole[0].state["optimizer"]}
    )
    with pytest.raises(AssertionError):
        assert_equal_states(rest[-1].state, whole[-1].state)


def test_evaluation_comes_before_training_and_after_each_epoch_on_the_averaged_weights():
    task = TinyTask()
    snapshots = run_training(task, train_config())
    steps = [0, STEPS, 2 * STEPS, 3 * STEPS]
    assert [step for step, _ in snapshots[-1].state["evaluations"]] == steps
    assert [step for step, metrics in history_of(snapshots) if "score" in metrics] == steps
    for judged, snapshot in zip(task.judged, snapshots[::2], strict=True):
        assert all(torch.equal(judged[name], value) for name, value in snapshot.state["ema"].items())
    trained = snapshots[-1].state
    assert not torch.equal(trained["ema"]["out.weight"], trained["model"]["out.weight"])


def test_other_ranks_evaluate_the_weights_of_the_first_and_keep_neither_metrics_nor_state(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.mul_(2))  # as if rank 0 had the same
    monkeypatch.setattr("torch.distributed.broadcast", lambda values, source: values.fill_(source))  # and all zeros
    task, snapshots = TinyTask(rank=1, world=2), []
    train(task, train_config(epochs=1), Worker(rank=1, world=2), None, snapshots.append)
    assert len(task.judged) == 2
    assert not any(value.any() for judged in task.judged for value in judged.values())
    assert not any(value.any() for value in task.module.state_dict().values())
    assert (task.worker.rank, task.worker.world) == (1, 2)
    assert [snapshot.state for snapshot in snapshots] == [None] * 3
    assert "score" not in {name for _, metrics in history_of(snapshots) for name in metrics}
    assert snapshots[-2].history[-1][1]["samples_seen"] == STEPS * BATCH * 2


@pytest.mark.parametrize(("best", "expected"), [("highest", [0, 1, 3]), ("lowest", [0, 2])])
def test_a_snapshot_knows_whether_it_is_the_best(best, expected):
    scores = iter([2.0, 3.0, 1.0, 4.0])
    task = TinyTask()
    task.evaluate = lambda averaged, raw: {"score": next(scores)}
    snapshots = run_training(task, train_config(best_metric="score", best_is=best, checkpoint_steps=4))
    ends = [snapshot for snapshot in snapshots if snapshot.state["position"]["batch"] == 0]
    assert [number for number, snapshot in enumerate(ends) if snapshot.best] == expected
    assert not any(snapshot.best for snapshot in snapshots if snapshot not in ends)


def test_without_a_best_metric_the_highest_headline_of_the_task_is_the_best():
    scores = iter([{"score": 2.0}, {}, {"score": 1.0}, {"score": 4.0}])
    task = TinyTask()
    task.headline, task.evaluate = "score", lambda averaged, raw: next(scores)
    snapshots = run_training(task, train_config())
    ends = [snapshot for snapshot in snapshots if snapshot.state["position"]["batch"] == 0]
    assert [number for number, snapshot in enumerate(ends) if snapshot.best] == [0, 3]


def test_a_metric_of_the_raw_weights_may_be_the_best_from_the_start_on():
    class Both(TinyTask):
        def evaluate(self, averaged, raw):
            return {"raw": 1.0 if raw is None else 0.0}

    snapshots = run_training(Both(), train_config(best_metric="raw"))
    assert [metrics["raw"] for _, metrics in snapshots[-1].state["evaluations"]] == [1, 0, 0, 0]
    assert [snapshot.best for snapshot in snapshots] == [True] + [False] * 6


def test_a_best_metric_that_is_not_evaluated_is_refused_before_training():
    with pytest.raises(UserError, match=r"train.best_metric=knn is not an evaluated metric: score"):
        run_training(TinyTask(), train_config(best_metric="knn"))


def test_raw_weights_are_evaluated_as_well_as_averaged_ones():
    class Both(TinyTask):
        watched: tuple = ()

        def evaluate(self, averaged, raw):
            assert raw is (self.module if self.judged else None)
            assert not (raw or averaged).training
            return {**super().evaluate(averaged, raw), **({"raw": 1.0} if raw else {})}

        def draw(self, module, evaluations):
            self.watched = (*self.watched, [step for step, _ in evaluations])

    task = Both()
    evaluations = run_training(task, train_config())[-1].state["evaluations"]
    assert ["raw" in metrics for _, metrics in evaluations] == [False, True, True, True]
    assert task.watched == ([0], [0, 6], [0, 6, 12], [0, 6, 12, 18])
    assert task.module.training is False
