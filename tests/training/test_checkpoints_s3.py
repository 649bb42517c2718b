"""Checkpoints in an object store, on a real S3 endpoint on loopback."""

import pickle

import pytest
import torch
from pyarrow import fs

from pipeline.runs.disk import checkpoint_folder, release
from pipeline.storage.store import Store
from pipeline.training.checkpoint import (
    STATE_FILE,
    best_copy_path,
    delete_previous_best,
    open_folder,
)
from pipeline.training.config import TrainConfig
from pipeline.training.ray_train import _shares

ELSEWHERE = TrainConfig(checkpoints="s3://models/here/")


@pytest.fixture
def folder(bucket, tmp_path):
    """Where the checkpoints of a run go."""
    return checkpoint_folder(ELSEWHERE, tmp_path / "photos-distill-1a2b", "train")


def test_shares_stop_file_states_and_the_best_lie_in_the_bucket(folder):
    assert folder == "s3://models/here/photos-distill-1a2b/train"
    config = TrainConfig(workers=4, batch_size=8)
    assert _shares(config, folder) == 4
    assert _shares(TrainConfig(workers=2, batch_size=8), folder) == 4
    filesystem, path = open_folder(folder)
    filesystem.open_output_stream(f"{path}/shares").close()  # as of a job that was killed while it wrote
    assert _shares(config, folder) == 4

    filesystem, path = pickle.loads(pickle.dumps(open_folder(folder)))  # noqa: S301  as it travels to workers
    assert path == "models/here/photos-distill-1a2b/train"
    store = pickle.loads(pickle.dumps(Store(folder)))  # noqa: S301
    assert not store.exists("stop")
    store.put("stop", b"why")
    assert store.exists("stop")
    assert store.get("stop") == b"why"
    store.delete("stop")
    assert not store.exists("stop")

    for number in (1, 2):
        checkpoint = f"{path}/checkpoint-000{number}-000000"
        with filesystem.open_output_stream(f"{best_copy_path(checkpoint)}/{STATE_FILE}") as stream:
            torch.save({"number": number}, stream)
        delete_previous_best(filesystem, checkpoint)
    best = filesystem.get_file_info(fs.FileSelector(f"{path}/best", recursive=True))
    assert [item.path.partition("/best/")[2] for item in best if item.type == fs.FileType.File] == [
        f"checkpoint-0002-000000/{STATE_FILE}"
    ]


def test_checkpoints_in_the_bucket_go_when_the_run_has_finished(folder, tmp_path):
    filesystem, path = open_folder(folder)
    names = [f"checkpoint-000{number}-000000" for number in range(3)]
    for name in (*names, f"best/{names[0]}"):
        with filesystem.open_output_stream(f"{path}/{name}/{STATE_FILE}") as stream:
            stream.write(b"state")
    store, run = Store(folder), tmp_path / "photos-distill-1a2b"
    for keep, left in ((5, names), (2, names[1:]), (0, [])):
        release(run, {"train": ELSEWHERE.model_copy(update={"keep_finished": keep})})
        assert store.folders() == ["best", *left]
    assert store.sub(f"best/{names[0]}").exists(STATE_FILE)
