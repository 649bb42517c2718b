"""Against a SQLite file and against a real MLflow server."""

import hashlib
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.student.model import Encoder, create_backbone, load_encoder
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.models import download_student, log_student
from pipeline.tracking.run import start_run

CONFIG = {
    "name": "tiny",
    "train": {"epochs": 3, "lr": 1e-3},
    "teachers": [{"model": "hog", "args": {}}, {"model": "sam", "weight": 0.5}],
    "note": "x" * 7000,
    "sizes": [1, 2],
}


def _free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def server_process(tmp_path_factory):
    """A server of its own for this module: it takes seconds to start, in which other tests run."""
    folder, port = tmp_path_factory.mktemp("server"), str(_free_port())
    command = [
        Path(sys.executable).parent / "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        "1",
    ]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", folder / "artifacts"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *stores], stdout=log, stderr=log, cwd=folder)
    try:
        yield SimpleNamespace(process=process, uri=f"http://127.0.0.1:{port}", log=folder / "log")
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(server_process):
    """URI of the server, which answers."""
    for _ in range(600):
        assert server_process.process.poll() is None, server_process.log.read_text()
        try:
            with urllib.request.urlopen(f"{server_process.uri}/health", timeout=1):
                return server_process.uri
        except OSError:
            time.sleep(0.1)
    raise AssertionError(server_process.log.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "deeper"


@pytest.fixture(scope="module", params=["sqlite", "server"])
def uri(request, work):
    """Both kinds of store; each is made once, since making one takes seconds."""
    return resolve_uri(None, work) if request.param == "sqlite" else request.getfixturevalue("server")


@pytest.fixture
def start(uri, work):
    def start(**changes):
        arguments = {"experiment": "tests", "name": "tiny-distill", "config": CONFIG, "tags": {"job": "distill"}}
        return start_run(uri, work=work, **{**arguments, **changes})

    return start


@pytest.fixture
def client(uri):
    return MlflowClient(uri)


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
    assert (travelled.run_id, travelled.uri) == (run.run_id, "")
    travelled.log_metric_dict({"after": 2.0})
    run.flush()
    assert client.get_run(run.run_id).data.metrics == {"before": 1.0, "after": 2.0}


class TinyStudent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, images):
        return self.norm(self.conv(images)).relu().mean(dim=(2, 3))


def test_a_model_that_was_logged_loads_alone_for_any_batch_size(start, client, uri, exported):
    run = start()
    model = TinyStudent().eval()
    nn.init.normal_(model.norm.running_mean)
    model_uri = log_student(
        run, model, torch.zeros(2, 3, 16, 16), name="student", metrics={"knn_after": 61.5}, tags={"model": "tiny"}
    )
    logged = client.get_logged_model(model_uri.removeprefix("models:/"))
    assert logged.source_run_id == run.run_id
    assert logged.tags["model"] == "tiny"
    assert {metric.key: metric.value for metric in logged.metrics} == {"knn_after": 61.5}
    _check_loads_alone(model_uri, uri, model)
    _check_students(run, client, model_uri, uri, exported)


def _check_loads_alone(model_uri, uri, model):
    """MLflow's own loader, as someone without this repository uses it."""
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pytorch.load_model(model_uri)
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))
    info = mlflow.models.get_model_info(model_uri)
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert info.signature.outputs.inputs[0].shape == (-1, 5)
    files = [file.name for file in Path(mlflow.artifacts.download_artifacts(model_uri)).rglob("*") if file.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pth", ".py"))]


@pytest.fixture
def exported(tmp_path):
    """A folder `student` as distillation exports it, and the encoder in it."""
    encoder, folder = Encoder(create_backbone("timm/test_resnet")).eval(), tmp_path / "student"
    folder.mkdir()
    save_file(encoder.backbone.state_dict(), folder / "student.safetensors")
    (folder / "student.json").write_text('{"model": "test_resnet", "args": {"num_classes": 0}}')
    return encoder, folder


def _check_students(run, client, model_uri, uri, exported):
    """The student comes from the safetensors of the run, whatever graph was logged beside them."""
    encoder, folder = exported
    with pytest.raises(UserError, match=r"student/student\.safetensors of the run that logged them"):
        download_student(model_uri, uri)
    for file in folder.iterdir():
        run.log_file(file, "student")
    client.create_registered_model(f"name-{run.run_id}")
    version = client.create_model_version(f"name-{run.run_id}", model_uri, run.run_id, model_id=model_uri[8:])
    client.set_registered_model_alias(version.name, "best", version.version)
    images = torch.rand(2, 3, 32, 32)
    for name in (
        model_uri,
        f"models:/{version.name}/{version.version}",
        f"models:/{version.name}@best",
        f"runs:/{run.run_id}/student",
    ):
        torch.testing.assert_close(load_encoder(download_student(name, uri))(images), encoder(images))
    for name in (
        "models:/",
        "file:///model",
        "models:/no-such-name/1",
        f"models:/{version.name}@worst",
        "runs:/none/x",
    ):
        with pytest.raises(UserError, match="cannot be loaded from"):
            download_student(name, uri)


def test_a_student_that_is_not_there_is_named(start, uri):
    start()
    with pytest.raises(UserError, match="m-0000 cannot be loaded from"):
        download_student("models:/m-0000", uri)


def test_the_store_is_the_configured_one_then_the_environment_s_then_the_work_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert resolve_uri("http://here:5000", tmp_path) == "http://here:5000"
    assert resolve_uri(None, tmp_path) == "http://there:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://me:secret@there:5000", "postgresql://me:secret@there/mlflow"])
def test_a_password_in_the_configuration_is_refused_and_not_repeated(tmp_path, uri):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        resolve_uri(uri, tmp_path)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_artifacts_of_the_sqlite_store_are_beside_it(start, work):
    run = start()
    run.log_text("a", "beside.txt")
    assert (work / "mlflow.db").is_file()
    assert [file.parent.parent.name for file in (work / "mlartifacts").rglob("beside.txt")] == [run.run_id]


def _start_at(uri, work):
    return start_run(uri, experiment="tests", name="a", config={"name": "a"}, tags={}, work=work)


def test_a_server_that_does_not_answer_is_named_soon(tmp_path):
    limits = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}
    uri, started = f"http://127.0.0.1:{_free_port()}", time.monotonic()
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
