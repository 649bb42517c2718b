"""Logged models and students, in a SQLite file and on a real MLflow server."""

import re
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.student.model import Encoder, create_backbone, load_encoder
from pipeline.tracking.models import download_model, download_student, log_model_folder, log_student
from pipeline.tracking.run import start_run


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
        run, model, torch.zeros(2, 3, 16, 16), name="encoder", metrics={"knn_after": 61.5}, tags={"model": "tiny"}
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


def test_models_belong_to_the_experiment_of_their_run(start, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("w")
    uris = (
        log_student(run, TinyStudent().eval(), torch.zeros(2, 3, 16, 16), name="encoder", metrics={}, tags={}),
        log_model_folder(run, folder, name="detect", metrics={}, tags={}),
    )
    experiment = client.get_experiment(run.experiment_id)
    listed = {model.model_id for model in client.search_logged_models([run.experiment_id])}
    for uri in uris:
        model = client.get_logged_model(uri.removeprefix("models:/"))
        assert model.model_id in listed
        assert model.experiment_id == run.experiment_id
        assert model.status == "READY"
        assert model.artifact_location.startswith(experiment.artifact_location)
    outputs = {output.model_id for output in client.get_run(run.run_id).outputs.model_outputs}
    assert outputs >= {uris[0].removeprefix("models:/")}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """The URI of a SQLite store, and ids of a job's run and of its nested run, which logged a student."""
    work = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{work}/mlflow.db"
    run = start_run(uri, experiment="e", name="r", config={"a": 1}, tags={}, work=work)
    nested = run.child("distill")
    (work / "model").mkdir()
    (work / "model" / "weights").touch()
    (work / "student.json").write_text("{}")
    nested.log_file(work / "student.json", "student")
    nested.flush()
    model = log_model_folder(run, work / "model", name="classify", metrics={}, tags={})
    for name, versions in (("photos", 3), ("it's", 1), ("flowers", 1), ("birds", 1), ("cars", 1), ("maps", 1)):
        run.client.create_registered_model(name)
        for _ in range(versions):
            run.client.create_model_version(name, model, run.run_id)
    run.client.set_registered_model_alias("photos", "best", "2")
    return uri, run.run_id, nested.run_id


PHOTOS = "; there are models:/photos/3, models:/photos/2 (@best), models:/photos/1"


@pytest.mark.parametrize("download", [download_model, download_student])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models:/photos/9", f"{PHOTOS}$"),
        ("models:/photos@worst", f"{PHOTOS}$"),
        ("models:/photos", f"{PHOTOS}$"),
        ("models:/photos/newest", f"{PHOTOS}$"),
        ("models:/photo/1", f"{PHOTOS}, .*, and 1 more$"),
        ("models:/it's/2", "; there are models:/it's/1$"),
        ("models:/m-000", r"; there are models:/\w+.*, and 1 more$"),
        ("runs:/abc/student", "Run with id=abc not found; there are models:/"),
        ("runs:/JOB/student", r"; did you mean runs:/NESTED/student\?$"),
    ],
)
def test_a_wrong_guess_is_told_what_there_is(registry, download, name, expected):
    uri, job, nested = registry
    with pytest.raises(UserError, match=expected.replace(PHOTOS, re.escape(PHOTOS)).replace("NESTED", nested)):
        download(name.replace("JOB", job), uri)


@pytest.mark.parametrize("download", [download_model, download_student])
def test_a_store_without_models_and_one_that_is_not_there_say_so(download, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start_run(uri, experiment="e", name="r", config={"a": 1}, tags={}, work=tmp_path)
    with pytest.raises(UserError, match=r"no model is registered there; .* name that one \(tracking\.uri"):
        download("models:/photos/1", uri)
    with pytest.raises(UserError, match=r"there is no MLflow store at .*none\.db"):
        download("models:/photos/1", f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
