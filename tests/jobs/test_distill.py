"""The main job on the real Ray with a real MLflow store, from sources to a student that loads."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from jobs import distill, evaluate, precompute
from jobs._cli import run
from pipeline.distill.config import DistillJobConfig
from pipeline.evaluate import job as evaluation
from pipeline.runs.addresses import fetch_student
from pipeline.runs.disk import RELEASED
from pipeline.runtime.units import size
from pipeline.student.loading import load_student
from pipeline.student.model import Encoder
from tests.fakes import SMALL_JOB, colours_entry, images_seen
from tests.report.pages import Page

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def first(tmp_path_factory, ray_session):
    """A finished distillation: its folder, arguments without teachers, teachers, text and figures."""
    folder = tmp_path_factory.mktemp("first")
    arguments = [*SMALL_JOB, f"work={folder}/work", f"outputs={folder}/results"]
    teachers = [f"teachers=[{colours_entry(folder / 'one')}, hog]", "teachers.1.input_size=32"]
    with redirect_stdout(StringIO()) as text:
        run(DistillJobConfig, distill.main, "a job", [*arguments, *teachers])
    figures = json.loads(text.getvalue().splitlines()[-1])
    return SimpleNamespace(folder=folder, arguments=arguments, teachers=teachers, text=text.getvalue(), figures=figures)


@pytest.fixture(scope="module")
def client(first):
    return MlflowClient(f"sqlite:///{first.folder}/work/mlflow.db")


@pytest.fixture(scope="module")
def phases(first, client):
    """The nested runs by name."""
    parent = client.get_run(first.figures["mlflow_run_id"])
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return {run.info.run_name: run for run in runs}


def test_a_job_computes_every_shard_once_and_prints_its_figures(first):
    assert "0 of 192 views cached" in first.text
    assert first.figures["shards_computed"] == 8
    assert images_seen(first.folder / "one") == 192
    assert 0 <= first.figures["knn_before"] <= 100
    assert 0 <= first.figures["knn_after"] <= 100


def test_results_are_copied_to_the_outputs(first, client):
    place = Path(client.get_run(first.figures["mlflow_run_id"]).data.tags["outputs"])
    assert place.parent == first.folder / "results"
    own = first.folder / "work/runs" / place.name / "student"
    copied, own = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (place / "student", own))
    assert copied == own
    assert (place / "figures/curves.png").is_file()
    assert (place / "report.html").read_bytes() == (
        first.folder / "work/runs" / place.name / "report.html"
    ).read_bytes()
    assert sorted(path.name for path in place.iterdir()) == ["figures", "report.html", "student"]


def test_a_job_is_a_run_with_two_phases(first, client, phases):
    parent = client.get_run(first.figures["mlflow_run_id"])
    assert sorted(phases) == ["distill", "precompute"]
    assert parent.data.metrics["hours"] * 3600 == pytest.approx(first.figures["seconds"], abs=15)
    assert parent.data.tags["device"] == "CPU"
    assert "gpu_hours" not in parent.data.metrics
    assert {run.info.status for run in (parent, *phases.values())} == {"FINISHED"}
    assert parent.data.params["train.epochs"] == "2"
    assert parent.data.params["teachers.1.model"] == "hog"
    assert parent.data.metrics["knn_after"] == first.figures["knn_after"]
    logged = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert logged >= {"config.yaml", "figures", "report.html"}


def test_the_report_has_the_figures_of_the_run(first, client, phases):
    parent = client.get_run(first.figures["mlflow_run_id"])
    file = Path(parent.data.tags["report"])
    assert str(file) in first.text
    assert Path(client.download_artifacts(parent.info.run_id, "report.html")).read_bytes() == file.read_bytes()
    assert file.stat().st_size < 2e6
    page, figures = Page(file.read_text()), first.figures
    page.check()
    lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    written = [(name, line["step"]) for line in lines for name in line if name != "step"]
    assert len(written) == len(set(written))
    for name, drawn in (
        ("knn", "averaged weights"),
        ("knn_raw", "raw weights"),
        ("val_cosine/hog/patches", "hog/patches"),
    ):
        curve = [line[name] for line in lines if name in line]
        assert [value for _, value in page.points(drawn)[: len(curve)]] == curve
        for shown in (parent, phases["distill"]):
            assert [point.value for point in client.get_metric_history(shown.info.run_id, name)] == curve
    assert page.points("averaged weights")[-1] == (2.0, figures["knn_after"])
    for value in (figures["knn_after"], figures["knn_before"], figures["teacher_knn/hog"]):
        assert f"{value:.1f} %" in page.text
    assert size(figures["cache_bytes"]) in page.text
    assert figures["model_uri"] in page.text
    assert str(first.figures["student"]) in page.text


def test_the_student_is_registered_with_its_lineage_and_the_run_tells_of_it(first, client, phases):
    figures = first.figures
    parent, name = client.get_run(figures["mlflow_run_id"]), figures["registered"].split("/")[1]
    version = client.get_model_version(name, "1")
    assert figures["registered"] == f"models:/{name}/1"
    assert version.run_id == phases["distill"].info.run_id
    assert (version.tags["teachers"], version.tags["licences"]) == ("colours8, hog", "none, none (computed)")
    assert float(version.tags["score"]) == pytest.approx(figures["knn_after"], rel=1e-4)
    train, held_out = version.tags["images"].split(", ")
    assert train.startswith("samples-train-n")
    assert held_out.startswith("samples-val-n")
    assert version.tags["manifests"] == f"runs:/{phases['precompute'].info.run_id}/manifests"
    note = parent.data.tags["mlflow.note.content"]
    assert f"[{figures['registered']}](#/models/{name}/versions/1)" in note
    assert "| hog | pretrained | 1.0 |" in note
    assert f"runs/{parent.info.run_id})" in phases["distill"].data.tags["mlflow.note.content"]
    assert parent.info.run_name == f"regla_t from tests.fakes:colours+hog seed0 {name.removesuffix('-student')}-distill"


def test_precompute_logs_where_the_cache_came_from(client, phases):
    run = phases["precompute"]
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


def test_distill_logs_its_curves(first, client, phases):
    run, figures = phases["distill"], first.figures
    steps = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "knn")}
    assert sorted(steps) == [0, 6, 12]
    assert (steps[0], steps[12]) == (figures["knn_before"], figures["knn_after"])
    raw = client.get_metric_history(run.info.run_id, "knn_raw")
    nearness = client.get_metric_history(run.info.run_id, "val_cosine/hog/patches")
    assert [m.step for m in raw] == [m.step for m in nearness] == [0, 6, 12]
    figures_logged = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
    assert figures_logged == {"figures/curves.png", "figures/features.png"}
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in losses] == list(range(1, 13))
    assert losses[-1].value < losses[0].value
    for name in ("loss/colours8/patches", "loss/colours8/summary", "loss/hog/patches", "images_per_second"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 12
    assert run.data.metrics["samples_seen"] == 288
    assert 2_000_000 < run.data.metrics["parameters"] < 3_000_000
    assert run.data.metrics["macs"] > run.data.metrics["parameters"]
    assert 0 <= run.data.metrics["data_wait_share"] <= 1
    assert run.data.metrics["teacher_knn/hog"] == figures["teacher_knn/hog"]
    assert run.data.tags["checkpoint"] == RELEASED


def test_a_finished_run_keeps_its_results_alone(first):
    folder = Path(first.figures["student"]).parent
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert not [name for name in files if name.endswith(".pt")]
    student = sum(count for name, count in files.items() if name.startswith("student/"))
    assert sum(files.values()) - student < 1e6


def test_the_student_loads_from_mlflow_and_is_as_good_as_the_job_said(first, job):
    work = first.folder / "work"
    mlflow.set_tracking_uri(f"sqlite:///{work}/mlflow.db")
    student = mlflow.pytorch.load_model(first.figures["model_uri"])
    assert student(torch.rand(3, 3, 32, 32)).shape == (3, 256)
    for name in (first.figures["model_uri"], next(work.glob("runs/*/student"))):
        _, evaluated = job(evaluate.knn, *first.arguments, f"evaluate.student={name}")
        assert evaluated["knn"] == pytest.approx(first.figures["knn_after"], abs=1e-6)


def test_the_student_says_what_it_comes_from_wherever_it_is(first):
    uri = f"sqlite:///{first.folder}/work/mlflow.db"
    folder = next(first.folder.glob("work/runs/*/student"))
    for student in (first.figures["model_uri"], str(folder)):
        encoder, name, size, _, origin, _ = load_student(fetch_student(student, uri))
        assert (name, size) == ("regla_t", 32)
        assert isinstance(encoder, Encoder)
        assert [teacher["name"] for teacher in origin["teachers"]] == ["colours8", "hog"]
        assert [data["images"] for data in origin["data"]] == [144]
        assert origin["knn"]["knn"] == first.figures["knn_after"]


def test_a_linear_probe_of_it_goes_on_after_an_interruption(first, client, phases, job, monkeypatch):
    probe = [*first.arguments, f"evaluate.student={first.figures['model_uri']}", "evaluate.epochs=3"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "accuracies", Mock(side_effect=RuntimeError("the power fails")))
        with pytest.raises(RuntimeError, match="the power fails"):
            job(evaluate.linear, *probe)
    monkeypatch.setattr(evaluation, "shuffled", lambda *_: lambda _: pytest.fail("an epoch is repeated"))
    text, figures = job(evaluate.linear, *probe)
    assert "resuming the unfinished run" in text
    assert 0 <= figures["top1"] <= figures["top5"] <= 100
    assert f"top1 {figures['top1']:7.2f} %" in text
    run = client.get_run(figures["mlflow_run_id"])
    assert run.data.tags["student_run"] == phases["distill"].info.run_id
    used, learned = ({i.dataset.name for i in part.inputs.dataset_inputs} for part in (run, phases["precompute"]))
    assert used == learned
    assert run.data.metrics["hours"] > 0
    assert run.data.metrics["top1"] == figures["top1"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/lr_0.1")] == [1, 2, 3]


@pytest.mark.slow
def test_a_segmentation_probe_of_it_takes_maps_from_the_model_in_mlflow(first, client, job):
    probe = [*first.arguments, f"evaluate.student={first.figures['model_uri']}", "evaluate.epochs=2"]
    text, figures = job(evaluate.seg_probe, *probe, "evaluate.input_size=64")
    assert "4x4x384 float16 per image" in text
    assert 0 < figures["miou"] < figures["aacc"] <= 100
    assert "iou.json" in {file.path for file in client.list_artifacts(figures["mlflow_run_id"])}


@pytest.mark.slow
def test_a_second_student_runs_no_teacher(first, client, job):
    seen = images_seen(first.folder / "one")
    text, second = job(
        distill.main,
        *first.arguments,
        *first.teachers,
        "train.epochs=1",
        "train.keep_finished=1",
        "train.workers=2",  # that wait for the gradients of all layers that are trained
        "loss.summary={cosine: 1, relation: 0.1}",  # to what all workers have seen
        "student.name=timm/mobilenetv4_conv_small_035",
    )
    assert "0 shards computed" in text
    assert second["shards_computed"] == 0
    assert images_seen(first.folder / "one") == seen
    assert second["mlflow_run_id"] != first.figures["mlflow_run_id"]
    assert (second["knn_before"], second["knn_after"]) != (None, None)
    (kept,) = Path(second["student"]).parent.rglob("*.pt")
    (child,) = client.search_runs(
        [client.get_run(second["mlflow_run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{second['mlflow_run_id']}' and attributes.run_name = 'distill'",
    )
    assert Path(child.data.tags["checkpoint"], "state.pt") == kept
    reference = mlflow.artifacts.load_dict(f"runs:/{child.info.run_id}/checkpoint/reference.json")
    assert (Path(reference["file"]), reference["bytes"]) == (kept, kept.stat().st_size)


def test_an_added_teacher_is_computed_alone(first, job):
    seen = images_seen(first.folder / "one")
    both = f"teachers=[{colours_entry(first.folder / 'one')}, {colours_entry(first.folder / 'two', dim=4)}]"
    _, third = job(precompute.main, *first.arguments, both)
    assert third["shards_computed"] == 4
    assert images_seen(first.folder / "one") == seen
    assert images_seen(first.folder / "two") == 192


@pytest.mark.slow
def test_two_workers_judge_as_one_does(first, job):
    text, figures = job(
        distill.main, *first.arguments, *first.teachers, "name=shared", "train.workers=2", "train.epochs=1"
    )
    assert "0 shards computed" in text
    assert figures["knn_before"] == first.figures["knn_before"]
