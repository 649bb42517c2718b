"""Gradient accumulation over micro-batches and shares."""

import pytest
import torch

from pipeline.training.loop import train
from pipeline.training.meter import StepTimer
from pipeline.training.step import Stepper
from pipeline.training.task import split_batch
from pipeline.training.worker import Worker
from tests.training.engine import (
    PLAIN,
    PLAIN_STEP,
    assert_equal_states,
    keep_snapshots,
    losses_of,
    run_training,
    train_config,
)
from tests.training.tiny_task import BATCH, STEPS, TinyTask, WholeBatches


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulated_gradients_train_as_whole_batches_however_unequal_the_pieces(micro):
    whole = run_training(TinyTask(**PLAIN), train_config(**PLAIN_STEP))
    cut = run_training(TinyTask(**PLAIN), train_config(**PLAIN_STEP, micro_batch=micro))
    for part in ("model", "ema"):
        torch.testing.assert_close(cut[-1].state[part], whole[-1].state[part], rtol=1e-5, atol=1e-6)
    for (_, metrics), (_, same) in zip(losses_of(cut), losses_of(whole), strict=True):
        for name in ("loss", "loss/half", "grad_norm", "samples_seen"):
            assert metrics[name] == pytest.approx(same[name], rel=1e-4)


def test_an_interrupted_run_with_accumulation_ends_as_one_that_was_not():
    config = train_config(checkpoint_steps=4, micro_batch=3)
    whole = run_training(TinyTask(), config)
    rest = run_training(TinyTask(), config, whole[3].state)
    assert_equal_states(rest[-1].state, whole[-1].state)
    both = losses_of(whole[:4]) + losses_of(rest)
    assert [metrics["loss"] for _, metrics in both] == [metrics["loss"] for _, metrics in losses_of(whole)]


@pytest.mark.parametrize(
    ("images", "shares", "world", "micro"),
    [(1, 16, 12, None), (1, 8, 3, None), (2, 5, 4, 1), (4, 3, 2, 3), (1, 2, 1, 1)],
)
def test_all_workers_run_equally_many_forwards_and_synchronise_the_last_also_with_more_pieces_than_images(
    images, shares, world, micro, monkeypatch
):
    counts, weights = set(), 0.0
    for rank in range(world):
        worker = Worker(rank, world, shares=shares)
        tasks = [TinyTask(share, shares, **PLAIN) for share in worker.own_shares]
        stepper = Stepper(tasks[0], train_config(micro_batch=micro), worker, [STEPS])
        seen = []

        def backward(piece, weight, synchronise, clock, seen=seen):
            seen.append((weight, synchronise))
            return {"loss": torch.tensor(2.0)}

        monkeypatch.setattr(stepper, "_backward", backward)
        batches = [split_batch(task.batch(0, 0, 0), BATCH // images)[0] for task in tasks]
        parts = stepper._accumulate(batches, 0, StepTimer(worker.device))
        assert float(parts["loss"]) == pytest.approx(2)
        assert [synchronise for _, synchronise in seen] == [False] * (len(seen) - 1) + [True]
        counts.add(len(seen))
        weights += sum(weight for weight, _ in seen)
    assert len(counts) == 1
    assert weights / world == pytest.approx(1)


def test_a_piece_without_weight_changes_nothing(monkeypatch):
    whole = run_training(TinyTask(**PLAIN), train_config(**PLAIN_STEP))
    monkeypatch.setattr(Worker, "pieces", lambda self, images, most: [BATCH + 3])
    padded = run_training(TinyTask(**PLAIN), train_config(**PLAIN_STEP))
    for part in ("model", "ema"):
        torch.testing.assert_close(padded[-1].state[part], whole[-1].state[part], rtol=1e-5, atol=1e-6)


def test_one_worker_with_two_shares_trains_as_on_both_batches():
    config = train_config(**PLAIN_STEP, micro_batch=3)
    shared = []
    others = [TinyTask(1, 2, **PLAIN)]
    train(TinyTask(0, 2, **PLAIN), config, Worker(shares=2), None, keep_snapshots(shared), others)
    whole = run_training(WholeBatches(world=2, **PLAIN), train_config(**PLAIN_STEP))
    torch.testing.assert_close(shared[-1].state["ema"], whole[-1].state["ema"], rtol=1e-5, atol=1e-6)
    assert shared[-1].state["position"] == {"epoch": 1, "batch": 0, "step": STEPS, "samples": STEPS * 2 * BATCH}
    assert [metrics["loss"] for _, metrics in losses_of(shared)] == pytest.approx(
        [metrics["loss"] for _, metrics in losses_of(whole)], rel=1e-4
    )
