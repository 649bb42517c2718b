"""Fine-tuning on the real Ray with a real MLflow store, from a distilled student's folder to a model that is evaluated."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import evaluate, finetune
from pipeline.downstream.saved import load_model
from tests.downstream.conftest import SMALL
from tests.report.pages import Page

ARGUMENTS = [*SMALL, "name=seg", "finetune.task=segment", "train.epochs=1", "train.workers=2"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_workers_fine_tune_a_model_that_keeps_its_scores(tmp_path, job, capsys):
    arguments = [*ARGUMENTS, f"work={tmp_path}/work"]
    text, figures = job(finetune.main, *arguments)
    assert "segment, 11 classes" in text
    client = MlflowClient(f"sqlite:///{tmp_path}/work/mlflow.db")
    parent = client.get_run(figures["mlflow_run_id"])
    assert parent.data.metrics["miou"] == figures["miou"]
    (child,) = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [point.step for point in client.get_metric_history(child.info.run_id, "miou")] == [0, 2]
    assert len(client.get_metric_history(child.info.run_id, "loss")) == 2
    left = [file.relative_to(Path(figures["model"]).parent) for file in Path(figures["model"]).parent.rglob("*.pt")]
    assert [file.parts[:2] for file in left] == [("train", "best")]
    for shown in (child, parent):
        logged = {file.path for file in client.list_artifacts(shown.info.run_id, "evaluation")}
        assert {"evaluation/per_class.csv", "evaluation/confusion.png", "evaluation/pictures"} <= logged
    scenes = [override for override in SMALL if override.startswith("data.samples")]  # all else the model knows
    page = Page(Path(parent.data.tags["report"]).read_text())
    page.check()
    assert page.points("miou") == [(0.0, figures["miou_before"]), (1.0, figures["miou"])]
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    for model in ("models:/seg-segment@best", figures["model"]):
        evaluate.start(["segment", f"work={tmp_path}/work", *scenes, f"evaluate.model={model}"])
        evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert evaluated["miou"] == pytest.approx(figures["miou"], abs=1e-3)
    folders = {folder.name for folder in (tmp_path / "work/runs").glob("segment-evaluate-*")}
    assert len(folders) == 2
    assert not any(name.endswith("-2") for name in folders)  # else one could go on with what the other has left
    assert figures["registered"] == "models:/seg-segment/1"
    assert client.get_model_version_by_alias("seg-segment", "best").tags["metric"] == "miou"
    origin = load_model(Path(figures["model"])).provenance
    assert (origin["data"][0]["images"], origin["metrics"]["miou"]) == (8, figures["miou"])


def test_a_mistake_is_named_before_anything_is_trained(tmp_path, refused):
    arguments = [*ARGUMENTS, f"work={tmp_path}/work"]
    for override, expected in {
        "finetune.student=no/such": "no/such: neither",
        "train.batch_size=64": "train.batch_size=64 is more than the 8",
        "finetune.task=sort": "finetune.task",
    }.items():
        assert expected in refused(finetune.main, *arguments, override)
    assert not (tmp_path / "work").exists()
