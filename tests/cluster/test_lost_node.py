"""Training on three Ray nodes, one of which is lost: it continues, and its loss is that of an undisturbed run."""

import json
import random

import pytest

from pipeline.training.loop import train
from pipeline.training.worker import Worker
from tests.cluster.inject_faults import PLAIN, TRAINING, WORKERS, Bench, inject
from tests.cluster.nodes import cluster
from tests.training.tiny_task import STEPS, WholeBatches


def _alone():
    """Loss by step of one process that takes the batches of all workers."""
    snapshots = []
    train(WholeBatches(world=WORKERS, **PLAIN), TRAINING, Worker(), None, snapshots.append)
    return {step: m["loss"] for snapshot in snapshots for step, m in snapshot.history if "loss" in m}


@pytest.mark.slow
def test_a_training_that_loses_a_node_goes_on_and_has_the_losses_of_one_that_does_not(tmp_path):
    with cluster(3, 3, 3) as nodes:
        bench = Bench(nodes, tmp_path, random.Random(0))
        found = inject(bench, "train: node lost", 1)
    losses = [json.loads(line) for line in (tmp_path / "train-1" / "committed").read_text().splitlines()]
    # What was committed before the node was lost is said again, for MLflow to leave out.
    assert sorted({step for step, _ in losses}) == list(range(1, TRAINING.epochs * STEPS + 1))
    assert dict(losses) == pytest.approx(_alone(), rel=1e-3)
    assert found["restarts"] == 0
    assert isinstance(found["lost"], int)
