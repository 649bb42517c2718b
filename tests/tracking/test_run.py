"""Runs in a SQLite file and on a real MLflow server."""

import hashlib
import json
import math
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking.address import resolve_uri, sqlite_file
from pipeline.tracking.run import start_run
from pipeline.tracking.run_log import RunLog
from tests.tracking.conftest import CONFIG, free_port


def test_a_job_is_a_run_with_its_configuration_tags_and_commit(start, client, tmp_path):
    run = start()
    logged = client.get_run(run.run_id)
    assert logged.info.run_name == "tiny-distill"
    assert logged.info.status == "RUNNING"
    assert client.get_experiment(logged.info.experiment_id).name == "tests"
    assert logged.data.tags["job"] == "distill"
    assert len(logged.data.tags["mlflow.source.git.commit"]) == 40
    assert logged.data.params == {
        "name": "tiny",
        "train.epochs": "3",
        "train.lr": "0.001",
        "teachers.0.model": "hog",
        "teachers.0.args": "{}",
        "teachers.1.model": "sam",
        "teachers.1.weight": "0.5",
        "note": "x" * 6000,
        "sizes": "[1, 2]",
    }
    file = client.download_artifacts(run.run_id, "config.yaml", str(tmp_path))
    assert yaml.safe_load(Path(file).read_text()) == CONFIG


def test_a_phase_is_a_nested_run(start, client):
    run = start()
    child = run.child("distill")
    logged = client.get_run(child.run_id)
    assert logged.info.run_name == "distill"
    assert logged.data.tags["mlflow.parentRunId"] == run.run_id
    assert logged.info.experiment_id == run.experiment_id
    child.finish()
    assert client.get_run(child.run_id).info.status == "FINISHED"
    assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_resumed_job_goes_on_in_the_same_runs(start, client):
    run = start()
    child = run.child("distill")
    child.log_metric_dict({"loss": 2.0}, step=1)
    for ended in (child, run):
        ended.finish("FAILED")
    again = start(run_id=run.run_id, config={**CONFIG, "train": {"epochs": 5}, "new": 1})
    assert again == run
    assert again.child("distill", run_id=child.run_id) == child
    for resumed in (run, child):
        assert client.get_run(resumed.run_id).info.status == "RUNNING"
    params = client.get_run(run.run_id).data.params
    assert (params["train.epochs"], params["new"]) == ("3", "1")
    child.log_metric_dict({"loss": 1.0}, step=2)
    assert [(m.step, m.value) for m in client.get_metric_history(child.run_id, "loss")] == [(1, 2.0), (2, 1.0)]


def test_a_resumed_run_does_not_end_as_its_last_start_did(start, client):
    run = start()
    run.finish("FAILED")
    run.buffer.append("metrics", [["loss", 2.0, 0, 1]])
    run.buffer.append("status", ["FAILED", 1])  # as of a start whose server was down at its end
    again = start(run_id=run.run_id)
    again.flush()
    logged = client.get_run(run.run_id)
    assert (logged.info.status, logged.data.metrics) == ("RUNNING", {"loss": 2.0})


def test_a_run_that_is_gone_is_begun_anew(start, client):
    run = start()
    client.delete_run(run.run_id)
    for gone in (run.run_id, "0" * 32):
        again = start(run_id=gone)
        assert again.run_id != gone
        assert client.get_run(again.run_id).info.status == "RUNNING"


def test_thousands_of_points_are_logged_and_those_that_are_not_finite_left_out(start, client):
    run = start()
    history = [(step, {"loss": 1 / (step + 1), "rate": float(step)}) for step in range(700)]
    history += [(700, {"loss": math.nan, "rate": math.inf}), (701, {"loss": -math.inf, "rate": 701})]
    run.log_metrics(iter(history))
    losses, rates = (client.get_metric_history(run.run_id, name) for name in ("loss", "rate"))
    assert {m.step: m.value for m in losses} == {step: 1 / (step + 1) for step in range(700)}
    assert [m.step for m in rates] == [*range(700), 701]
    assert client.get_run(run.run_id).data.metrics["rate"] == 701
    run.log_metrics([])


def test_a_step_of_a_curve_is_logged_once_whoever_repeats_it(start, client):
    run = start()
    run.log_metrics([(step, {"loss": float(step)}) for step in (1, 2, 3)])
    again = start(run_id=run.run_id)  # after a crash, from a checkpoint before step 2
    again.log_metrics([(step, {"loss": 10.0 * step, "knn": 0.5}) for step in (2, 3, 4)])
    points = {name: client.get_metric_history(run.run_id, name) for name in ("loss", "knn")}
    assert sorted((point.step, point.value) for point in points["loss"]) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert sorted(point.step for point in points["knn"]) == [2, 3, 4]


def test_the_curves_and_pictures_of_a_phase_are_also_those_of_the_job(start, client, tmp_path):
    run = start()
    child = run.child("distill")
    copy = pickle.loads(pickle.dumps(child))  # noqa: S301  as Ray Train's controller logs them
    copy.log_metrics([(step, {"loss": float(step)}) for step in (1, 2)])
    child.log_metrics([(2, {"loss": 9.0}), (3, {"loss": 3.0})])  # a resumed run repeats a step
    (tmp_path / "curves.png").write_bytes(b"picture")
    child.log_picture(tmp_path / "curves.png", "figures")
    for flushed in (child, run):
        flushed.flush()
        points = client.get_metric_history(flushed.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert [file.path for file in client.list_artifacts(flushed.run_id, "figures")] == ["figures/curves.png"]
    lines = Path(run.buffer.store.uri).parents[1].joinpath("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]


def test_a_large_file_is_logged_by_reference(start, client, tmp_path):
    run = start()
    (tmp_path / "state.pt").write_bytes(b"weights")
    run.log_reference(tmp_path / "state.pt", "s3://models/state.pt", "checkpoint/reference.json")
    logged = json.loads(Path(client.download_artifacts(run.run_id, "checkpoint/reference.json")).read_text())
    digest = hashlib.sha256(b"weights").hexdigest()
    assert logged == {"file": "s3://models/state.pt", "bytes": 7, "sha256": digest}


def test_data_is_an_input_of_the_run(start, client):
    run = start()
    run.log_dataset("scenes-train-1a2b", "folder/of/photos", "a" * 64, "train")
    run.log_dataset("scenes-val-3c4d", "samples", "b" * 8, "val")
    inputs = {i.dataset.name: i for i in client.get_run(run.run_id).inputs.dataset_inputs}
    assert sorted(inputs) == ["scenes-train-1a2b", "scenes-val-3c4d"]
    train = inputs["scenes-train-1a2b"]
    assert train.dataset.digest == "a" * 36
    assert json.loads(train.dataset.source) == {"location": "folder/of/photos"}
    assert {tag.key: tag.value for tag in train.tags} == {"mlflow.data.context": "train"}


def test_text_dictionaries_and_files_are_artifacts(start, client, tmp_path):
    run = start()
    (tmp_path / "weights.bin").write_bytes(b"\x00\x01")
    run.log_text("a line\n", "notes/a.txt")
    run.log_dict({"b": 1}, "plan.json")
    run.log_file(tmp_path / "weights.bin", "student")
    (tmp_path / "back").mkdir()
    back = Path(client.download_artifacts(run.run_id, "", str(tmp_path / "back")))
    assert (back / "notes/a.txt").read_text() == "a line\n"
    assert json.loads((back / "plan.json").read_text()) == {"b": 1}
    assert (back / "student/weights.bin").read_bytes() == b"\x00\x01"


def test_a_run_travels_to_other_processes(start, client):
    run = start()
    run.log_metric_dict({"before": 1.0})
    travelled = pickle.loads(pickle.dumps(run))  # noqa: S301
    assert (type(travelled), travelled.run_id) == (RunLog, run.run_id)
    travelled.log_metric_dict({"after": 2.0})
    run.flush()
    assert client.get_run(run.run_id).data.metrics == {"before": 1.0, "after": 2.0}


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_artifacts_of_a_sqlite_store_are_in_its_folder(start, work):
    run = start()
    run.log_text("a", "beside.txt")
    assert (work / "mlflow.db").is_file()
    assert [file.parent.parent.name for file in (work / "mlartifacts").rglob("beside.txt")] == [run.run_id]


def _start_at(uri, work):
    return start_run(uri, experiment="tests", name="a", config={"name": "a"}, tags={}, work=work)


def test_a_server_that_does_not_answer_is_named_soon(tmp_path):
    limits = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}
    uri, started = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(UserError, match=rf"MLflow at {uri} cannot be used .*tracking\.uri") as error:
        _start_at(uri, tmp_path)
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)
    assert limits == {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}


@pytest.mark.parametrize("path", ["file", "file/mlflow.db"])
def test_a_file_that_is_no_store_is_named(tmp_path, path):
    (tmp_path / "file").write_text("longer than the header of a database " * 20)
    uri = f"sqlite:///{tmp_path}/{path}"
    with pytest.raises(UserError, match=f"MLflow at {uri} cannot be used") as error:
        _start_at(uri, tmp_path / "work")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["gopher://store", "postgresql+nodriver://host/db"])
def test_a_kind_of_store_that_there_is_not_is_named(tmp_path, uri):
    with pytest.raises(UserError, match=f"MLflow at {re.escape(uri)} cannot be used"):
        _start_at(uri, tmp_path / "work")


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a b", "a#b", "a@b:c", "ä%", "a%3Fb"])
def test_store_and_artifacts_are_in_the_work_folder_whatever_its_name(tmp_path, name):
    work = tmp_path / name
    run = _start_at(resolve_uri(None, work), work)
    run.log_text("a", "beside.txt")
    run.finish()
    assert sqlite_file(run.uri) == work / "mlflow.db"
    assert MlflowClient(run.uri).download_artifacts(run.run_id, "beside.txt")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "mlartifacts"} <= {file.name for file in work.iterdir()}


def test_a_deleted_experiment_is_named_with_the_way_out(tmp_path):
    uri = resolve_uri(None, tmp_path)
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("tests"))
    with pytest.raises(
        UserError, match=r"tests was deleted in MLflow; restore it \(mlflow experiments restore -x 1\), or"
    ):
        _start_at(uri, tmp_path)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_store_of_files_is_refused_with_the_way_out(tmp_path, uri):
    with pytest.raises(UserError, match=r"tracking\.uri: .*name a database.*MLFLOW_ALLOW_FILE_STORE=true$"):
        _start_at(uri, tmp_path)


@pytest.mark.parametrize("name", ["", "a" * 1000])
def test_a_name_that_mlflow_refuses_is_no_matter_of_the_store(tmp_path, name):
    with pytest.raises(UserError, match=r"^tracking\.experiment: MLflow refuses the name"):
        start_run(resolve_uri(None, tmp_path), experiment=name, name="a", config={}, tags={}, work=tmp_path)
