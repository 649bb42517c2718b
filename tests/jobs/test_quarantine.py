"""Damaged photos: named and left out; too many of them stop the job with their list."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import distill
from tests.fakes import SMALL_JOB, colours_entry, corrupt, images_seen, truncate, write_photos

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def arguments(tmp_path):
    write_photos(tmp_path / "train", 100)
    write_photos(tmp_path / "val", 30, seed=1)
    corrupt(tmp_path / "train/class1/photo004.jpg")
    truncate(tmp_path / "val/class0/photo003.jpg")
    data = [f"data.train={tmp_path}/train", f"data.val={tmp_path}/val", "data.max_bad=0.04"]
    teacher = colours_entry(tmp_path / "calls")
    return [*SMALL_JOB, *data, "train.epochs=1", f"work={tmp_path}/work", f"teachers=[{teacher}]"]


def test_damaged_photos_are_named_and_left_out_and_too_many_stop_the_job(tmp_path, arguments, job, refused, caplog):
    _, figures = job(distill.main, *arguments)
    assert images_seen(tmp_path / "calls") == 128
    assert 0 <= figures["knn_after"] <= 100
    for name in ("class1/photo004.jpg", "class0/photo003.jpg"):
        (line,) = [record.message for record in caplog.records if name in record.message]
        assert line.startswith("quarantined ")
    client = MlflowClient(f"sqlite:///{tmp_path}/work/mlflow.db")
    (run,) = client.search_runs(
        ["1"], f"tags.`mlflow.parentRunId` = '{figures['mlflow_run_id']}' AND attributes.run_name = 'precompute'"
    )
    listed = json.loads(Path(client.download_artifacts(run.info.run_id, "quarantine.json", str(tmp_path))).read_text())
    assert [[sample["sample_id"] for sample in listed[split]] for split in ("train", "val")] == [
        ["class1/photo004.jpg"],
        ["class0/photo003.jpg"],
    ]

    line = refused(distill.main, *arguments, "data.max_bad=0.02")
    assert "1 of 30 images" in line
    assert "class0/photo003.jpg" in line
    assert "data.max_bad" in line
    assert images_seen(tmp_path / "calls") == 128
