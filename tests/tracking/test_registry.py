"""MLflow's registry on a real SQLite store: versions, the best of those that were measured alike, and what they come from."""

import logging
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.cache.config import PrecomputeJobConfig
from pipeline.config.jobs import job_root
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.runs.folder import RunState
from pipeline.runs.session import Job
from pipeline.tracking.models import download_model, log_model_folder, source_run_id
from pipeline.tracking.registry import Registration, describe, model_link, register
from pipeline.tracking.run import start_run

LINEAGE = {
    "teachers": "hog, sam",
    "licences": "apache-2.0",
    "images": "photos-train-1, photos-val-2",
    "manifests": "runs:/0/manifests",
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A job's run, and the URI of a model that it logged; a store takes seconds to make."""
    work = tmp_path_factory.mktemp("work")
    run = start_run(f"sqlite:///{work}/mlflow.db", experiment="e", name="r", config={"a": 1}, tags={}, work=work)
    (work / "model").mkdir()
    torch.save({}, work / "model/weights")
    return run, log_model_folder(run, work / "model", name="classify", metrics={"top1": 50}, tags={})


@pytest.fixture
def job(logged, request):
    """The run, its client, and a registration under a name of this test's own."""
    run, uri = logged
    name = request.node.name[:20]
    return run, run.client, Registration(name, uri, "top1", 50.0, "val-40-ab", LINEAGE)


@pytest.fixture
def another(logged, tmp_path):
    """The URI of a model that another run has logged."""
    (tmp_path / "weights").touch()
    return lambda: log_model_folder(logged[0].child("classify"), tmp_path, name="classify", metrics={}, tags={})


def test_a_model_becomes_the_first_version_with_its_lineage_and_a_link_to_its_run(job):
    run, client, registration = job
    assert register(run, registration) == f"models:/{registration.name}/1"
    version = client.get_model_version(registration.name, "1")
    measured = {"metric": "top1", "score": "50", "held_out": "val-40-ab", "experiment": run.experiment_id}
    assert version.tags == {**measured, **LINEAGE}
    assert version.run_id == run.run_id
    assert f"(#/experiments/{run.experiment_id}/runs/{run.run_id}): top1 50." in version.description
    assert "| licences | apache-2.0 |" in version.description
    assert "| teachers | hog, sam |" in version.description
    assert "| images | photos-train-1, photos-val-2 |" in version.description
    assert "runs:/0/manifests" not in version.description  # ids are for programs, which read the tags
    assert f"{registration.name}@best" in client.get_registered_model(registration.name).description


def test_a_run_that_is_started_again_keeps_its_version(job, tmp_path):
    run, client, registration = job
    register(run, registration)
    (tmp_path / "weights").touch()
    again = log_model_folder(run, tmp_path, name="classify", metrics={}, tags={})
    assert register(run, replace(registration, model_uri=again)) == f"models:/{registration.name}/1"
    assert len(client.search_model_versions(f"name = '{registration.name}'")) == 1


def test_the_alias_goes_to_the_best_of_those_that_were_measured_alike(job, another, caplog):
    run, client, registration = job
    for score, held_out, expected in [
        (50, "val-40-ab", "1"),
        (60, "val-40-ab", "2"),
        (55, "val-40-ab", "2"),
        (60, "val-40-ab", "2"),  # an equal does not displace
        (None, "", "2"),  # never measured
        (70, "val-80-cd", "2"),  # other images: neither is known to be the better one
        (61, "val-40-ab", "7"),
    ]:
        model = another()
        register(run, replace(registration, model_uri=model, score=score, held_out=held_out))
        assert str(client.get_model_version_by_alias(registration.name, "best").version) == expected
    assert f"{registration.name}/6 was measured on other images (val-80-cd) than the best version, 2" in caplog.text
    for uri in (f"models:/{registration.name}@best", f"models:/{registration.name}/latest"):
        assert (download_model(uri, run.uri) / "weights").is_file()
        assert source_run_id(client, uri) == source_run_id(client, model)


def test_the_best_is_marked_anew_where_its_alias_was_deleted(job, another):
    run, client, registration = job
    register(run, registration)
    client.delete_registered_model_alias(registration.name, "best")
    register(run, replace(registration, model_uri=another(), score=20, held_out="val-80-cd"))
    assert str(client.get_model_version_by_alias(registration.name, "best").version) == "2"


def test_generated_scenes_of_every_seed_are_one_held_out_set(job, another):
    run, client, registration = job
    for seed, score, expected in ((0, 70.0, "1"), (1, 60.0, "1"), (2, 80.0, "3")):
        config = load_config(DistillJobConfig, None, [f"name={registration.name}", f"seed={seed}"])
        started = Job(config, "distill", RunState(folder=Path(), mlflow={}, finished=False), run, run.uri)
        registered = started.register(
            "student", another(), metric="knn_after", score=score, held_out=f"scenes-{seed}", lineage={}
        )
        name = registered.removeprefix("models:/").partition("/")[0]
        assert str(client.get_model_version_by_alias(name, "best").version) == expected


def test_the_experiment_begins_with_links_to_the_best_and_keeps_what_else_was_written_there(job, another):
    run, client, registration = job
    model = another()
    note = lambda: client.get_experiment(run.experiment_id).tags["mlflow.note.content"]  # noqa: E731
    written = note().partition("\n")[2] + "\nours"
    client.set_experiment_tag(run.experiment_id, "mlflow.note.content", written)
    for uri, score, other in ((registration.model_uri, 40, 30), (model, 50, 60)):
        register(run, replace(registration, model_uri=uri, score=score))
        register(run, replace(registration, model_uri=uri, name="other", score=other))
        head, _, rest = note().partition("\n")
        assert f"[{registration.name} {1 if score == 40 else 2}](#/models/{registration.name}/versions/" in head
        assert f"(top1 {score})" in head
        assert f"(top1 {other})" in head
        assert rest.strip() == written.strip()


def test_a_store_without_a_registry_is_a_warning_and_stops_nothing(job, monkeypatch, caplog):
    run, _, registration = job

    def refuse(*_, **__):
        raise MlflowException("no registry here")

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    with caplog.at_level(logging.WARNING):
        assert register(run, registration) is None
    assert f"not registered as {registration.name}: no registry here" in caplog.text


def test_a_model_is_registered_even_if_the_best_cannot_be_marked(job, monkeypatch, caplog):
    run, client, registration = job

    def refuse(*_, **__):
        raise MlflowException("no aliases here")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuse)
    with caplog.at_level(logging.WARNING):
        registered = register(run, replace(registration, name="unmarked", score=1.0))
    assert registered == "models:/unmarked/1"
    assert client.get_model_version("unmarked", "1").tags["score"] == "1"
    assert "registered as models:/unmarked/1, but the best one was not marked: no aliases here" in caplog.text


def test_runs_and_experiments_describe_themselves(job):
    run, client, _ = job
    describe(run, ["**one**", "two"])
    child = run.child("distill")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "**one**\n\ntwo"
    note = client.get_run(child.run_id).data.tags["mlflow.note.content"]
    assert f"(#/experiments/{run.experiment_id}/runs/{run.run_id})" in note
    assert "alias `best`" in client.get_experiment(run.experiment_id).tags["mlflow.note.content"]
    assert model_link("models:/photos-classify/3") == "#/models/photos-classify/versions/3"


def test_the_title_of_a_run_begins_with_what_it_is_about():
    fields = ["name=photos", "teachers=[hog, timm/resnet18]", "student.name=regla_m", "seed=3"]
    fields += ["evaluate.student=work/runs/a/student", "evaluate.model=work/runs/a/model"]
    titles = {
        "distill": "regla_m from hog+resnet18 seed3 photos-distill",
        "precompute": "hog+resnet18 seed3 photos-precompute",
        "finetune": "classify regla_m from scratch seed3 photos-finetune",
        "knn": "work/runs/a/student seed3 photos-knn",
        "evaluate-detect": "work/runs/a/model seed3 photos-evaluate-detect",
    }
    for job, title in titles.items():
        assert load_config(job_root(job), None, fields).title(job) == title


def test_the_note_of_a_run_says_what_it_is_made_from():
    sentence = "The student starts from the weights `models:/a/1`."
    assert sentence in load_config(DistillJobConfig, None, ["student.weights=models:/a/1"]).note("distill")
    assert sentence not in load_config(PrecomputeJobConfig, None, ["student.weights=models:/a/1"]).note("precompute")
    config = load_config(DistillJobConfig, None, ["data.train=photos/train", "teachers=[hog]"])
    note = "\n\n".join(config.note("distill"))
    assert "Images: `photos/train`, held out: `none`." in note
    assert "| hog | pretrained | 1.0 |" in note
    assert "Training: 30 epochs of batches of a size that suits the data at 256 px, seed 0." in note


def test_a_version_is_found_in_its_own_store_whatever_the_global_tracking_uri(job, tmp_path, monkeypatch):
    run, _, registration = job
    register(run, registration)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
    for name in (f"{registration.name}@best", f"{registration.name}/1", f"{registration.name}/latest"):
        assert (download_model(f"models:/{name}", run.uri) / "weights").is_file()
