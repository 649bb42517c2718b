"""The start and the end of a job, on a real SQLite store and an embedded Ray session."""

import json
import shutil

import pytest

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.runs import session as job_module
from pipeline.runs.folder import RunState
from pipeline.runs.session import open_job


@pytest.fixture
def config(tmp_path):
    return lambda *overrides: load_config(DistillJobConfig, None, [f"work={tmp_path}/work", *overrides])


@pytest.mark.parametrize("field", ["work", "outputs", "train.checkpoints"])
def test_a_place_that_cannot_be_written_is_named_before_anything_starts(tmp_path, config, field, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(job_module, "connect", lambda: pytest.fail("Ray was started"))
    with (
        pytest.raises(UserError, match=f"^{field}: cannot write {tmp_path}/file/below/.*; name a writable location"),
        open_job(config(f"{field}={tmp_path}/file/below"), "distill"),
    ):
        pass


def test_a_place_of_one_phase_that_cannot_be_written_is_named_before_anything_starts(tmp_path, config):
    (tmp_path / "file").touch()
    elsewhere = f"phases=[{{train.checkpoints: {tmp_path}/a}}, {{train.checkpoints: {tmp_path}/file/below}}, {{}}]"
    changed = config(elsewhere, f"train.checkpoints={tmp_path}/a")
    assert list(changed.shared_folders()) == ["train.checkpoints", "phases.1.train.checkpoints"]
    with (
        pytest.raises(UserError, match=r"^phases\.1\.train\.checkpoints: cannot write .*"),
        open_job(changed, "distill"),
    ):
        pass


@pytest.mark.parametrize("field", ["outputs", "train.checkpoints"])
@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_named_before_anything_starts(config, field):
    with (
        pytest.raises(UserError, match=f"^{field}: s3://elsewhere does not exist"),
        open_job(config(f"{field}=s3://elsewhere/x"), "distill"),
    ):
        pass


@pytest.mark.usefixtures("ray_session")
def test_a_failure_to_record_hours_does_not_hide_what_ended_the_job(config, monkeypatch, caplog):
    def full(_):
        raise OSError(28, "No space left on device")

    def fail():
        with open_job(config(), "distill"):
            monkeypatch.setattr(RunState, "save", full)
            raise UserError("cannot write the shard: No space left on device")

    with pytest.raises(UserError, match="cannot write the shard"):
        fail()
    assert "hours of this start are not recorded: [Errno 28] No space left on device" in caplog.text


@pytest.mark.usefixtures("ray_session")
def test_a_job_on_a_cluster_says_what_the_cluster_has(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.runtime.ray_session.is_cluster", lambda: True)
    with open_job(config(), "distill") as job:
        pass
    first, store, cluster = capsys.readouterr().out.splitlines()[:3]
    assert first == f"new run in {job.state.folder}"
    assert store == f"MLflow: sqlite:///{tmp_path}/work/mlflow.db, experiment regla-distill"
    assert cluster.startswith("cluster: 1 nodes, ")
    assert json.loads((job.state.folder / "run.json").read_text())["finished"]


@pytest.mark.usefixtures("ray_session")
def test_what_is_resumed_or_replaced_is_named_and_the_run_keeps_a_log(tmp_path, config, capsys, caplog):
    places = config(f"outputs={tmp_path}/results")

    def fail():
        with open_job(places, "distill") as job:
            print("half done")
            job.run.log_metrics([(step, {"loss": step / 2}) for step in (1, 2)])
            raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        fail()
    first = capsys.readouterr().out
    with open_job(places, "distill") as job:
        (job.state.folder / "figures").mkdir()
        (job.state.folder / "figures/a.png").touch()
        job.run.log_metrics([(2, {"loss": 1.0}), (3, {"loss": 1.5, "knn": 50.0})])
    second = capsys.readouterr().out
    assert f"new run in {job.state.folder}\n" in first
    assert f"resuming the unfinished run in {job.state.folder}\n" in second
    log = (job.state.folder / "log.txt").read_text()
    assert log.count("--- 20") == 2
    assert "half done\n" in log
    assert "resuming the unfinished run" in log
    lines = [json.loads(line) for line in (job.state.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5, "knn": 50.0}]
    shutil.rmtree(tmp_path / "work/runs")  # the same outputs from another work folder
    with open_job(places, "distill"):
        pass
    assert f"outputs: {tmp_path}/results/{job.state.folder.name} holds results of another run" in caplog.text
