"""The flags of jobs/precompute.py, as a user meets them: text, last line of JSON, exit code."""

import json
import os
import pty
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs import distill, precompute
from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.runs.folder import cache_store
from pipeline.storage.store import Store
from tests.fakes import SMALL_JOB, colours_entry, without_ray

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def arguments(tmp_path):
    return [*SMALL_JOB, f"work={tmp_path}/work", f"teachers=[{colours_entry(tmp_path / 'calls')}]"]


@pytest.fixture
def start(capsys):
    """Run the job in this process; gives exit code, what it printed, and the figures of its last line."""

    def run(*arguments):
        try:
            precompute.run(
                precompute.PrecomputeJobConfig,
                precompute.main,
                "",
                list(arguments),
                precompute.add_modes,
            )
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        text, error = capsys.readouterr()
        return code, text + error, json.loads(text.splitlines()[-1]) if code < 2 else None

    return run


@pytest.fixture
def cached(tmp_path, arguments, monkeypatch):
    """A complete cache; gives the Parquet files of its teacher on the training images, which are three shards."""
    config = load_config(DistillJobConfig, None, arguments)
    plan = plan_cache(config, cache_store(config))
    with monkeypatch.context() as patch:
        without_ray(patch)
        build_cache(plan, config)
    (part,) = plan_cache(config, cache_store(config)).split("train").dataset.parts
    return sorted(Path(part.store.uri).glob("views/full/teachers/*/shard-*.parquet"))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _begin(*arguments):
    """Start the job as its users do, without a terminal."""
    command = [sys.executable, "jobs/precompute.py", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes)


def _end(process):
    text, error = process.communicate()
    figures = json.loads(text.splitlines()[-1]) if process.returncode < 2 else None
    return process.returncode, text + error, figures


@pytest.mark.slow
def test_processes_verify_and_repair_list_plan_refuse_to_delete_and_collect_garbage(tmp_path, arguments, cached):
    broken, *sound = cached
    content, times = broken.read_bytes(), [path.stat().st_mtime_ns for path in sound]
    _flip(broken)
    old = broken.with_name("shard-00000-01234567.parquet")
    old.write_bytes(b"12345")
    os.utime(old, (time.time() - 7200,) * 2)
    address = broken.parts[-2]
    work = f"work={tmp_path}/work"
    teachers = f"teachers=[{colours_entry(tmp_path / 'calls')}, {{model: hog, input_size: 32}}]"
    begun = [
        _begin(*arguments, "--verify", "--repair"),
        _begin(work, "--list"),
        _begin(work, "--gc", "--yes"),
        _begin(work, "--delete", address),
        _begin(*arguments, teachers, "plan.gpu_hour_price=3600", "plan.images_per_second=500", "--plan"),
    ]
    repaired, listed, collected, deleted, planned = map(_end, begun)

    code, text, figures = repaired
    assert (code, figures["ok"], figures["files"], figures["rows_recomputed"]) == (0, True, 8, 192 - 48)
    assert (figures["findings"], figures["repaired"]) == (1, 1)
    assert broken.name in text
    assert "after the repair\n  all is well" in text
    assert broken.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in sound] == times

    assert listed[0] == 0
    assert address in [entry["address"] for entry in listed[2]["entries"]]
    assert address in listed[1]
    assert collected[2] == {"files": 1, "bytes": 5}
    assert not old.exists()
    assert deleted[0] == 2
    assert "nothing was removed: add --yes, because there is no terminal to confirm on" in deleted[1]
    _check_plan(*planned)


def _check_plan(code, text, figures):
    assert code == 0, text
    assert 192 <= figures["views_missing"] <= 192 + 48
    assert figures["bytes_per_view"]["colours8"]["float32"] == 4 * 8 * 17
    assert figures["read_bytes_per_second"] >= 500 * figures["bytes_per_view"]["hog"]["pca-int8-zstd"]
    assert figures["price"] == pytest.approx(figures["gpu_hours"] * 3600)
    assert 0 < figures["missing_bytes"] < figures["free_bytes"]
    for expected in (
        "views/s on",
        "192 of 192",
        "float16",
        "pca-int8-zstd (chosen)",
        "still to be written",
        "iB/s for plan.",
    ):
        assert expected in text


def test_the_exit_code_tells_what_verifying_found(arguments, cached, start, monkeypatch):
    without_ray(monkeypatch)
    monkeypatch.setattr(precompute, "connect", nullcontext)
    monkeypatch.setattr(precompute, "check_shared", lambda config: None)  # it would open a Ray session of its own
    monkeypatch.setattr(precompute, "hardware_line", lambda: "computing on CPU")
    code, text, figures = start(*arguments, "--verify")
    assert (code, figures["ok"], figures["findings"]) == (0, True, 0)
    assert "all is well" in text
    _flip(cached[1])
    code, text, figures = start(*arguments, "--verify")
    assert (code, figures["ok"], figures["findings"], figures["repaired"]) == (1, False, 1, 0)
    assert cached[1].name in text
    code, _, figures = start(*arguments, "--repair")
    assert (code, figures["findings"], figures["repaired"]) == (0, 1, 1)


def test_what_has_an_address_is_deleted(arguments, cached, start):
    address = cached[0].parts[-2]
    code, _, figures = start(*arguments, "--delete", address, "--yes")
    assert (code, figures["deleted"]) == (0, address)
    assert not cached[0].parent.exists()


@pytest.mark.parametrize(("answer", "left"), [("n", True), ("", True), ("y", False)])
def test_on_a_terminal_it_asks(tmp_path, start, monkeypatch, answer, left):
    (tmp_path / "work/cache/mine-01234567").mkdir(parents=True)
    described = tmp_path / "work/cache/mine-01234567/dataset.json"
    described.write_text('{"format": 0}')
    main, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin:
        os.write(main, f"{answer}\n".encode())
        monkeypatch.setattr(sys, "stdin", stdin)
        code, text, figures = start(f"work={tmp_path}/work", "--delete", "mine-01234567")
    os.close(main)
    assert code == 0
    assert "[y/N]" in text
    assert (figures["deleted"] is None) == left
    assert described.exists() == left


def test_what_cannot_fit_is_refused_before_anything_starts(tmp_path, arguments, start, refused, monkeypatch):
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    for flags in ((), ("--plan",)):
        code, text, _ = start(*arguments, *flags)
        assert code == 2
        assert "0.00 GiB are free" in text
        assert "cache.codec" in text
    assert "are free" in refused(distill.main, *arguments)
    assert start(*arguments, "--dry-run")[0] == 0
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--verify"], "not allowed with argument --plan"),
        (["--dry-run", "--gc"], "not allowed with argument --dry-run"),
        (["--repair", "--list"], "--repair goes with --verify"),
        (["--repair", "--dry-run"], "--repair goes with --verify"),
        (["--yes"], "--yes goes with --delete or --gc"),
        (["--verify", "--yes"], "--yes goes with --delete or --gc"),
        (["--delete"], "--delete: expected one argument"),
        (["--delete", "nothing", "--yes"], "holds no nothing"),
        (["--verify"], "holds nothing yet: run jobs/precompute.py"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, start, arguments, flags, message, monkeypatch):
    monkeypatch.setattr(precompute, "connect", lambda: pytest.fail("Ray was started"))
    code, text, _ = start(*arguments, *flags)
    assert code == 2
    assert message in text
    assert not (tmp_path / "work").exists()


def test_an_empty_cache_is_listed_as_such(tmp_path, start):
    code, text, figures = start(f"work={tmp_path}/work", "--list")
    assert (code, figures["entries"], figures["bytes"]) == (0, [], 0)
    assert "holds nothing" in text
