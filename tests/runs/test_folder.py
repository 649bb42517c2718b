import errno
import json
import os
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.runs.folder import cache_store, open_run, work_folder


@pytest.fixture
def configure(tmp_path):
    return lambda *overrides: load_config(DistillJobConfig, None, [f"work={tmp_path}/work", "name=my run", *overrides])


@pytest.fixture
def not_submitted(monkeypatch):
    for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_SUBMISSION_ID"):
        monkeypatch.delenv(name, raising=False)


def test_the_work_folder_is_work_in_the_current_directory(tmp_path, monkeypatch, not_submitted):
    monkeypatch.chdir(tmp_path)
    assert work_folder(load_config(DistillJobConfig, None)) == tmp_path / "work"


@pytest.mark.parametrize("variable", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_SUBMISSION_ID"])
def test_a_submitted_job_works_in_the_home_folder(tmp_path, monkeypatch, not_submitted, variable):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "raysubmit_1")
    assert work_folder(load_config(DistillJobConfig, None)) == tmp_path / "regla-distill"
    assert work_folder(load_config(DistillJobConfig, None, [f"work={tmp_path}/mine"])) == tmp_path / "mine"


def test_a_work_folder_that_is_given_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert work_folder(load_config(DistillJobConfig, None, ["work=a/../b"])) == tmp_path / "b"
    assert work_folder(load_config(DistillJobConfig, None, ["work=~/c"])) == tmp_path / "home/c"


def test_the_cache_is_in_the_work_folder_unless_named(tmp_path, configure):
    assert cache_store(configure()).uri == str(tmp_path / "work/cache")
    assert cache_store(configure(f"cache.uri={tmp_path}/elsewhere")).uri == str(tmp_path / "elsewhere")


def test_a_new_run_writes_nothing_until_it_is_saved(tmp_path, configure):
    state = open_run(configure(), "distill")
    assert state.folder.parent == tmp_path / "work/runs"
    assert state.folder.name == f"my-run-distill-{configure().fingerprint()[:8]}"
    assert (state.mlflow, state.finished, state.resumed) == ({}, False, False)
    assert not (tmp_path / "work").exists()


def test_an_unfinished_run_is_resumed_with_its_mlflow_runs_and_hours(configure):
    state = open_run(configure(), "distill")
    state.hours = 1.5
    state.mlflow["job"] = "abc"
    state.save()
    again = open_run(configure(), "distill")
    assert (again.folder, again.mlflow, again.resumed) == (state.folder, {"job": "abc"}, True)
    assert (again.hours, again.gpu_hours) == (1.5, 0.0)


def test_a_finished_run_is_left_alone_and_the_next_number_is_used(configure):
    folders = []
    for _ in range(3):
        state = open_run(configure(), "distill")
        assert not state.resumed
        state.mlflow["job"] = f"run {len(folders)}"
        state.finished = True
        state.save()
        folders.append(state.folder)
    stem = folders[0].name
    assert [folder.name for folder in folders] == [stem, f"{stem}-2", f"{stem}-3"]
    assert [json.loads((f / "run.json").read_text())["mlflow"]["job"] for f in folders] == ["run 0", "run 1", "run 2"]


def test_the_unfinished_one_of_several_runs_is_resumed(configure):
    for finished in (True, False):
        state = open_run(configure(), "distill")
        state.finished = finished
        state.save()
    again = open_run(configure(), "distill")
    assert again.folder.name.endswith("-2")
    assert again.resumed


@pytest.mark.parametrize("change", ["train.lr=2e-3", "name=other", "seed=1", "teachers=[hog, sam]"])
def test_another_configuration_is_another_run(configure, change):
    open_run(configure(), "distill").save()
    other = open_run(configure(change), "distill")
    assert not other.resumed
    assert other.folder != open_run(configure(), "distill").folder


def test_another_job_is_another_run_and_another_place_is_the_same(configure):
    open_run(configure(), "distill").save()
    assert not open_run(configure(), "precompute").resumed
    for change in ("tracking.experiment=x", "train.workers=2", "train.keep_checkpoints=9", "train.lr=1e-3"):
        assert open_run(configure(change), "distill").resumed


def test_run_json_is_replaced_as_a_whole(configure, monkeypatch):
    state = open_run(configure(), "distill")
    state.mlflow["job"] = "abc"
    state.save()

    def killed(source, target):
        assert json.loads(Path(source).read_text())["finished"]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    state.finished = True
    with pytest.raises(KeyboardInterrupt):
        state.save()
    known = json.loads((state.folder / "run.json").read_text())
    assert (known["mlflow"], known["finished"]) == ({"job": "abc"}, False)
    assert open_run(configure(), "distill").resumed


def test_a_run_json_that_cannot_be_written_is_named(configure, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*/run\.json: No space left on device; once it can be"):
        open_run(configure(), "distill").save()
