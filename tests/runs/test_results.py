"""Results of runs in a folder and in an object store, and students taken from there."""

import pytest
import torch

from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.saved import find_model
from pipeline.errors import UserError
from pipeline.runs.addresses import fetch_student
from pipeline.runs.results import outputs_store, publish
from pipeline.storage.fetch import fetch
from pipeline.student.loading import load_student
from pipeline.student.model import Encoder, create_backbone, save_encoder


@pytest.fixture
def run(tmp_path):
    """Folder of a run with a student, a figure and a checkpoint."""
    folder = tmp_path / "runs/photos-distill-1a2b"
    encoder = Encoder(create_backbone("timm/test_resnet", {})).eval()
    save_encoder(encoder, "timm/test_resnet", {}, 64, folder / "student")
    for name in ("report.html", "figures/curves.png", "train/checkpoint-0001/state.pt", "run.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize("place", ["s3://models/results/", "{tmp_path}/results"])
def test_results_are_copied_and_a_student_is_loaded_from_its_address(bucket, tmp_path, run, place):
    store = outputs_store(place.format(tmp_path=tmp_path))
    address = publish(run, store)
    assert address == f"{store.uri}/photos-distill-1a2b"
    assert store.sub(run.name).folders() == ["figures", "student"]
    assert [*store.sub(run.name).files()] == ["report.html"]
    images = torch.rand(2, 3, 64, 64)
    assert find_model(f"{address}/student", "") is None
    found, own = load_student(fetch_student(f"{address}/student", "")), load_student(str(run / "student"))
    torch.testing.assert_close(found.encoder(images), own.encoder(images))
    assert found.input_size == 64


def test_what_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="s3://models/nowhere/student: the folder does not exist or is empty"):
        fetch("s3://models/nowhere/student")
    with pytest.raises(UserError, match=r"outputs: .*s3://elsewhere does not exist"):
        outputs_store("s3://elsewhere/results")


def test_where_results_go_does_not_make_another_run():
    assert DistillJobConfig(outputs="s3://models/results").fingerprint() == DistillJobConfig().fingerprint()
