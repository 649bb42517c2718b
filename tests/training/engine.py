"""Trainings of the tiny task, and what they commit."""

import io
from dataclasses import replace

import torch

from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.worker import Worker

CHECKPOINTS = [
    "checkpoint-0000-000000",
    "checkpoint-0000-000004",
    "checkpoint-0000-000006",
    "checkpoint-0001-000000",
    "checkpoint-0001-000002",
    "checkpoint-0001-000006",
    "checkpoint-0002-000000",
    "checkpoint-0002-000004",
    "checkpoint-0002-000006",
    "checkpoint-0003-000000",
]
"""Of 3 epochs of 6 steps with a checkpoint every 4 steps, at the end of an epoch, and after its evaluation."""


TIMES = ("images_per_second", "data_wait_share", "forward_share", "backward_share")


def train_config(**changes):
    settings = {"epochs": 3, "batch_size": 2, "lr": 0.05, "ema_decay": 0.9, "precision": "float32", "workers": 1}
    return TrainConfig(**{**settings, **changes})


def through_bytes(state):
    """As a checkpoint file keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def keep_snapshots(snapshots):
    """A commit that keeps every snapshot as its file would hold it."""
    return lambda given: snapshots.append(replace(given, state=through_bytes(given.state)))


def run_training(task, config, state=None):
    """Train to the end; gives every snapshot."""
    snapshots = []
    train(task, config, Worker(), state, keep_snapshots(snapshots))
    return snapshots


def history_of(snapshots):
    return [(step, metrics) for snapshot in snapshots for step, metrics in snapshot.history]


def assert_equal_states(state, other):
    for part in ("model", "ema"):
        assert state[part].keys() == other[part].keys()
        for name, value in state[part].items():
            assert torch.equal(value, other[part][name]), f"{part} {name}"


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


PLAIN = {"dropout": 0.0, "batch_norm": False}
"""Without what differs by rank, so that several ranks compute what one process computes on all batches."""


PLAIN_STEP = {"epochs": 1, "batch_size": 4, "clip_grad": 100.0}


def losses_of(snapshots):
    return [(step, metrics) for step, metrics in history_of(snapshots) if "loss" in metrics]
