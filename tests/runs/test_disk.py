import json

import pytest

from pipeline.runs.disk import bytes_of, remove_checkpoints, runs_of


@pytest.fixture
def work(tmp_path):
    """A finished run of two phases, an unfinished one, and one whose run.json is damaged."""
    for name, state in (("done", {"finished": True}), ("open", {"finished": False}), ("torn", None)):
        run = tmp_path / "runs" / name
        for phase in ("train/phase-1", "train/phase-2"):
            for checkpoint in ("checkpoint-1-0", "checkpoint-2-0", "best/checkpoint-1-0"):
                (run / phase / checkpoint).mkdir(parents=True)
                (run / phase / checkpoint / "state.pt").write_bytes(bytes(1000))
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
    assert [len(run.checkpoints) for run in runs] == [4, 4, 4]
    assert [remove_checkpoints(run) for run in runs] == [4000, 0, 0]
    assert not list((work / "runs/done").rglob("checkpoint-2-0"))
    assert len(list((work / "runs/done").rglob("best/checkpoint-1-0/state.pt"))) == 2
    assert (work / "runs/done/student/student.safetensors").exists()
    assert len(list((work / "runs/open").rglob("state.pt"))) == len(list((work / "runs/torn").rglob("state.pt"))) == 6


def test_a_link_to_checkpoints_elsewhere_is_neither_followed_nor_removed(work, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "state.pt").write_bytes(bytes(5000))
    (work / "runs/done/train/phase-1/checkpoint-9-0").symlink_to(elsewhere)
    done = runs_of(work)[0]
    assert remove_checkpoints(done) == 4000
    assert (elsewhere / "state.pt").exists()


def test_bytes_are_those_of_files(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/one").write_bytes(bytes(3))
    (tmp_path / "a/b/two").write_bytes(bytes(4))
    (tmp_path / "link").symlink_to(tmp_path / "a/one")
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "a") == 7
    assert bytes_of(tmp_path / "a/one", tmp_path / "missing") == 3
