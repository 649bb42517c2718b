"""A fine-tuning that is killed and started again, and one on two workers, end as one that was left alone."""

import pytest
from mlflow import MlflowClient

from jobs import finetune
from jobs._cli import RECIPES
from tests.downstream.conftest import SMALL
from tests.jobs.test_kill import kill_when

STEPS = 16
# The statistics of BatchNorm are those of a piece: with pieces of two, one worker has those of two workers on a CPU.
ARGUMENTS = [
    str(RECIPES / "classify.yaml"),
    *SMALL,
    "finetune.task=classify",
    "classify.mixup=0",
    "classify.cutmix=0",
    "train.micro_batch=2",
]
ARGUMENTS += ["train.epochs=8", "data.samples.train=8"]


def losses(work):
    """Of the job's only run: loss by step."""
    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`mlflow.parentRunId` != ''")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    return [point.value for point in history]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_it_ends_as_one_that_was_left_alone(tmp_path, job, monkeypatch):
    _, whole = job(finetune.main, *ARGUMENTS, f"work={tmp_path}/whole")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    _, shared = job(finetune.main, *ARGUMENTS, f"work={tmp_path}/shared", "train.workers=2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    assert shared["top1"] == whole["top1"]

    killed = [*ARGUMENTS, f"work={tmp_path}/killed"]
    kill_when("finetune.py", killed, lambda: list(tmp_path.glob("killed/runs/*/train/checkpoint-0002-*")), tmp_path)
    text, resumed = job(finetune.main, *killed)
    assert "resuming the unfinished run" in text
    assert "train epoch 1/" not in text
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert resumed["top1"] == whole["top1"]
