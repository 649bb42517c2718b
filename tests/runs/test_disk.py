import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.config import EvaluateModelJobConfig, FinetuneJobConfig
from pipeline.errors import UserError
from pipeline.runs.disk import bytes_of, checkpoint_folder, release, remove_checkpoints, runs_of
from pipeline.training.config import TrainConfig
from tests.faults import blinking


@pytest.fixture
def work(tmp_path):
    """A finished run of two phases, an unfinished one, and one whose run.json is damaged."""
    for name, state in (("done", {"finished": True}), ("open", {"finished": False}), ("torn", None)):
        run = tmp_path / "runs" / name
        for phase in ("train/phase-1", "train/phase-2"):
            for checkpoint in ("checkpoint-1-0", "checkpoint-2-0", "best/checkpoint-1-0"):
                (run / phase / checkpoint).mkdir(parents=True)
                (run / phase / checkpoint / "state.pt").write_bytes(bytes(1000))
        for extra in ("start.pt", "train/phase-1.pt", "start/student.safetensors", "soft-teacher/model.safetensors"):
            (run / extra).parent.mkdir(exist_ok=True)
            (run / extra).write_bytes(bytes(100))
        (run / "student").mkdir()
        (run / "student/student.safetensors").write_bytes(bytes(10))
        (run / "run.json").write_text(json.dumps(state) if state else '{"finished": tr')
    return tmp_path


def test_only_checkpoints_of_finished_runs_go_and_the_best_stay(work):
    runs = runs_of(work)
    assert [(run.folder.name, run.state) for run in runs] == [
        ("done", "finished"),
        ("open", "unfinished"),
        ("torn", "unreadable"),
    ]
    assert [len(run.checkpoints) for run in runs] == [8, 8, 8]
    assert [remove_checkpoints(run) for run in runs] == [4400, 0, 0]
    assert not list((work / "runs/done").rglob("checkpoint-2-0"))
    assert len(list((work / "runs/done").rglob("best/checkpoint-1-0/state.pt"))) == 2
    assert (work / "runs/done/student/student.safetensors").exists()
    assert sorted(path.name for path in (work / "runs/done").iterdir()) == ["run.json", "student", "train"]
    assert len(list((work / "runs/open").rglob("state.pt"))) == len(list((work / "runs/torn").rglob("state.pt"))) == 6


def test_a_link_to_checkpoints_elsewhere_is_neither_followed_nor_removed(work, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "state.pt").write_bytes(bytes(5000))
    (work / "runs/done/train/phase-1/checkpoint-9-0").symlink_to(elsewhere)
    done = runs_of(work)[0]
    assert remove_checkpoints(done) == 4400
    assert (elsewhere / "state.pt").exists()


def test_bytes_are_those_of_files(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/one").write_bytes(bytes(3))
    (tmp_path / "a/b/two").write_bytes(bytes(4))
    (tmp_path / "link").symlink_to(tmp_path / "a/one")
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "a") == 7
    assert bytes_of(tmp_path / "a/one", tmp_path / "missing") == 3


def test_what_a_job_removes_meanwhile_counts_nothing(tmp_path):
    (tmp_path / "stays").write_bytes(bytes(3))
    with blinking(tmp_path / "a"):
        assert {bytes_of(tmp_path) for _ in range(5000)} == {3}


def test_what_cannot_be_read_counts_nothing(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "stays").write_bytes(bytes(3))
    listed = Path.iterdir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert bytes_of(tmp_path) == 3


def kept(run):
    """What is left of a run's checkpoints and states."""
    names = (file.relative_to(run / "train").as_posix() for file in (run / "train").rglob("*.pt"))
    return sorted(name.removesuffix("/state.pt") for name in names)


def test_a_finished_run_lets_go_of_all_but_what_its_phases_keep(work):
    run, best = work / "runs/done", [f"phase-{number}/best/checkpoint-1-0" for number in (1, 2)]
    for changes, latest in (("{train.keep_finished: 1}", ["phase-1/checkpoint-2-0"]), ("{}", [])):
        config = load_config(DistillJobConfig, None, [f"phases=[{changes}, {{}}]"])
        release(run, config.trainings())
        assert kept(run) == sorted([*best, *latest])
    assert sorted(path.name for path in run.iterdir()) == ["run.json", "student", "train"]


def test_checkpoints_that_cannot_be_removed_are_a_warning(work, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    release(work / "runs/done", {})
    assert "checkpoints of the finished run done stay: " in caplog.text
    assert "Permission denied" in caplog.text


def test_the_trainings_of_a_job():
    def names(root, *items):
        return [*load_config(root, None, items).trainings()]

    assert names(DistillJobConfig) == names(DistillJobConfig, "phases=[{train.lr: 1}]") == ["train"]
    assert names(DistillJobConfig, "phases=[{}, {}]") == ["train/phase-1", "train/phase-2"]
    assert names(FinetuneJobConfig) == ["train"]
    assert names(EvaluateModelJobConfig, "evaluate.model=one") == []


def test_checkpoints_are_in_the_folder_of_the_run_by_default(tmp_path):
    run = tmp_path / "run"
    assert checkpoint_folder(TrainConfig(), run, "train/phase-1") == f"{run}/train/phase-1"
    elsewhere = load_config(DistillJobConfig, None, [f"train.checkpoints={tmp_path}/elsewhere"]).train
    assert checkpoint_folder(elsewhere, run, "train") == f"{tmp_path}/elsewhere/run/train"
    with pytest.raises(UserError, match=r"train\.checkpoints: credentials in an address are refused"):
        checkpoint_folder(TrainConfig(checkpoints="s3://me:secret@models"), run, "train")
