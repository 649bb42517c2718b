"""The main job on the real Ray with a real MLflow store, from sources to a student that loads."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from jobs import distill, evaluate, precompute
from tests.fakes import SMALL_JOB, colours_entry, images_seen

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def arguments(tmp_path):
    return [
        *SMALL_JOB,
        f"work={tmp_path}/work",
        f"teachers=[{colours_entry(tmp_path / 'one')}, hog]",
        "teachers.1.input_size=32",
    ]


def test_from_sources_to_a_student_in_mlflow(tmp_path, arguments, job):
    text, figures = job(distill.main, *arguments)
    assert "0 of 3 shards there" in text
    assert figures["shards_computed"] == 8
    assert images_seen(tmp_path / "one") == 192
    assert 0 <= figures["knn_before"] <= 100
    assert 0 <= figures["knn_after"] <= 100

    client = MlflowClient(f"sqlite:///{tmp_path}/work/mlflow.db")
    parent = client.get_run(figures["mlflow_run_id"])
    _check_parent(client, parent, figures)
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    children = {run.info.run_name: run for run in runs}
    assert sorted(children) == ["distill", "precompute"]
    assert {run.info.status for run in (parent, *runs)} == {"FINISHED"}
    _check_precompute(client, children["precompute"])
    _check_distill(client, children["distill"], figures)
    _check_model(figures, tmp_path / "work")
    _check_evaluate(arguments, job, figures, tmp_path / "work")


def _check_parent(client, parent, figures):
    assert parent.data.params["train.epochs"] == "2"
    assert parent.data.params["teachers.1.model"] == "hog"
    assert parent.data.metrics["knn_after"] == figures["knn_after"]
    assert "config.yaml" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def _check_precompute(client, run):
    assert run.data.metrics["shards_computed"] == 8
    assert run.data.metrics["images_per_second"] > 0
    inputs = {i.dataset.name: i for i in run.inputs.dataset_inputs}
    assert len(inputs) == 2
    assert all(i.dataset.digest for i in inputs.values())
    manifests = [
        file.path for split in ("train", "val") for file in client.list_artifacts(run.info.run_id, f"manifests/{split}")
    ]
    assert len(manifests) == 4
    assert run.data.tags["teacher.0"].startswith("colours8-")


def _check_distill(client, run, figures):
    steps = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "knn")}
    assert sorted(steps) == [0, 6, 12]
    assert (steps[0], steps[12]) == (figures["knn_before"], figures["knn_after"])
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in losses] == list(range(1, 13))
    assert losses[-1].value < losses[0].value
    for name in ("loss/colours8/patches", "loss/colours8/summary", "loss/hog/patches", "images_per_second"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 12
    assert run.data.metrics["samples_seen"] == 288
    assert 0 <= run.data.metrics["data_wait_share"] <= 1
    assert run.data.metrics["teacher_knn/hog"] == figures["teacher_knn/hog"]
    assert run.data.tags["checkpoint"].endswith("checkpoint-0002-000000")
    assert Path(run.data.tags["checkpoint"]).is_dir()


def _check_model(figures, work):
    mlflow.set_tracking_uri(f"sqlite:///{work}/mlflow.db")
    student = mlflow.pytorch.load_model(figures["model_uri"])
    assert student(torch.rand(3, 3, 32, 32)).shape == (3, 256)


def _check_evaluate(arguments, job, figures, work):
    for student in (figures["model_uri"], next(work.glob("runs/*/student"))):
        _, evaluated = job(evaluate.main, *arguments, f"evaluate.student={student}")
        assert evaluated["knn"] == pytest.approx(figures["knn_after"], abs=1e-6)


def test_no_teacher_runs_twice_whatever_the_student_and_an_added_one_runs_alone(tmp_path, arguments, job):
    arguments += ["train.epochs=1", "data.samples.val=0"]
    _, first = job(distill.main, *arguments)
    assert first["shards_computed"] == 6
    assert first["knn_before"] is None
    seen = images_seen(tmp_path / "one")

    text, second = job(distill.main, *arguments, "student.name=timm/mobilenetv4_conv_small_035")
    assert "0 shards computed" in text
    assert second["shards_computed"] == 0
    assert images_seen(tmp_path / "one") == seen

    both = f"teachers=[{colours_entry(tmp_path / 'one')}, {colours_entry(tmp_path / 'two', dim=4)}]"
    _, third = job(precompute.main, *SMALL_JOB, f"work={tmp_path}/work", "data.samples.val=0", both)
    assert third["shards_computed"] == 3
    assert images_seen(tmp_path / "one") == seen
    assert images_seen(tmp_path / "two") == 144
    assert len({run["mlflow_run_id"] for run in (first, second, third)}) == 3


def test_a_finished_run_is_left_alone_and_the_same_command_starts_another(tmp_path, arguments, job):
    arguments += ["train.epochs=1", "data.samples.val=0"]
    _, first = job(distill.main, *arguments)
    _, second = job(distill.main, *arguments)
    assert first["mlflow_run_id"] != second["mlflow_run_id"]
    runs = sorted(path.name for path in (tmp_path / "work/runs").iterdir())
    assert len(runs) == 2
    assert runs[1] == f"{runs[0]}-2"
    assert all(json.loads((tmp_path / "work/runs" / run / "run.json").read_text())["finished"] for run in runs)
