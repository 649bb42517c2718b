"""jobs/clean.py: what it shows, asks and removes."""

import json

import pytest

from jobs import clean


@pytest.fixture
def work(tmp_path):
    for name, finished in (("done", True), ("open", False)):
        checkpoint = tmp_path / "work/runs" / name / "train/checkpoint-1-0"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.pt").write_bytes(bytes(2048))
        (tmp_path / "work/runs" / name / "run.json").write_text(json.dumps({"finished": finished}))
    (tmp_path / "work/cache").mkdir()
    (tmp_path / "work/cache/shard").write_bytes(bytes(100))
    return tmp_path / "work"


def _run(capsys, *arguments):
    clean.main(arguments)
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_it_shows_runs_cache_and_what_can_go_and_removes_nothing(work, capsys):
    out, figures = _run(capsys, "--work", str(work))
    rows = [line.split() for line in out.splitlines()]
    assert ["done", "finished", "2.0", "KiB", "18", "B"] in rows
    assert ["open", "unfinished", "2.0", "KiB", "19", "B"] in rows
    assert (figures["cache"], figures["removable"], figures["freed"]) == (100, 2048, 0)
    assert len(list(work.rglob("state.pt"))) == 2


def test_checkpoints_of_finished_runs_go_when_asked_and_confirmed(work, capsys):
    with pytest.raises(SystemExit) as stopped:
        clean.main(["--work", str(work), "--checkpoints"])
    assert stopped.value.code == 2
    assert "add --yes" in capsys.readouterr().err
    _, figures = _run(capsys, "--work", str(work), "--checkpoints", "--yes")
    assert (figures["freed"], figures["removable"]) == (2048, 0)
    assert [path.parent.parent.parent.name for path in work.rglob("state.pt")] == ["open"]
    assert _run(capsys, "--work", str(work), "--checkpoints", "--yes")[1]["freed"] == 0


def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        clean.main(["--work", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --work: ")
