"""The start and the end of a job, on a real SQLite store and an embedded Ray session."""

import json

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
    assert capsys.readouterr().out.startswith("cluster: 1 nodes, ")
    assert json.loads((job.state.folder / "run.json").read_text())["finished"]
