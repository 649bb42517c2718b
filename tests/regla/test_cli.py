"""The command `regla`: each subcommand is a job, and the shell completes commands, options, recipes, fields and values."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from regla import cli
from tests.conftest import REPOSITORY


def regla(*arguments, **more):
    command = [sys.executable, "-m", "regla", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, **more)


def test_every_job_is_a_command_and_help_lists_it_at_once():
    jobs = {path.stem for path in (REPOSITORY / "jobs").glob("[a-z]*.py")}
    assert set(cli.COMMANDS) == jobs | {"plan"}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = regla("--help")
        times.append(time.perf_counter() - started)
    assert done.returncode == 0
    assert min(times) < 1
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command}\b", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"plan"}))
def test_help_of_a_command_is_that_of_its_job(command):
    script = [sys.executable, f"jobs/{command}.py", "--help"]
    shown = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    own = regla(command, "--help").stdout
    # The name of the program decides where the usage lines are broken.
    assert own.partition("\n\n")[2] == shown.partition("\n\n")[2]
    assert own.startswith(f"usage: regla {command} ")


def test_an_unknown_command_and_a_mistyped_field_end_with_code_2():
    ended = regla("distil")
    assert ended.returncode == 2
    assert "invalid choice: 'distil'" in ended.stderr
    ended = regla("distill", "train.epoch=5")
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown key train.epoch; did you mean train.epochs?\n"


def test_plan_is_distill_with_its_flag(monkeypatch):
    asked = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda module, run_name: asked.append((module, run_name, *sys.argv)))
    monkeypatch.setattr(sys, "argv", ["regla"])
    cli.main(["plan", "photos.yaml", "seed=1"])
    assert asked == [("jobs.distill", "__main__", "regla plan", "--plan", "photos.yaml", "seed=1")]


def complete(line, folder, shell="bash"):
    """Completions of a command line, as argcomplete's shell functions ask for them."""
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_SHELL": shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "completions")}
    command = [sys.executable, "-m", "regla"]
    subprocess.run(command, env={**os.environ, **asked}, cwd=folder, capture_output=True, check=True)
    return [completion.strip() for completion in (folder / "completions").read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("regla dis", ["distill"]),
        ("regla completion b", ["bash"]),
        ("regla distill train.ep", ["train.epochs="]),
        ("regla distill quick", ["quickstart.yaml"]),
        ("regla distill my", ["my_recipe.yaml"]),
        ("regla distill my_recipe.yaml tracking.ur", ["tracking.uri="]),
        ("regla distill cache.precision=", ["cache.precision=bfloat16", "cache.precision=float32"]),
        ("regla distill data.train=pho", ["data.train=photos/"]),
        ("regla distill --dr", ["--dry-run"]),
        ("regla plan --dr", ["--dry-run"]),
        ("regla evaluate co", ["coco-results", "correspondence"]),
        ("regla evaluate knn evaluate.stu", ["evaluate.student="]),
        ("regla predict --ta", ["--task"]),
        ("regla export student --format hf on", ["onnx"]),
        ("regla compare --exp", ["--experiment"]),
        ("regla submit fine", ["finetune"]),
        ("regla submit finetune finetune.stu", ["finetune.student="]),
    ],
)
def test_the_shell_completes(line, expected, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "my_recipe.yaml").touch()
    assert sorted(complete(line, tmp_path)) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_complete_fields(shell, tmp_path):
    found = complete("regla distill train.ep", tmp_path, shell)
    assert [re.split(r":|\t", each)[0] for each in found] == ["train.epochs="]


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_the_code_for_a_shell_is_valid_there(shell):
    code = regla("completion", shell).stdout
    assert "regla" in code
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=code, text=True, check=True)


def test_bash_completes_a_field(tmp_path):
    (tmp_path / "regla").write_text(f'#!/bin/sh\nexec {sys.executable} -m regla "$@"\n')
    (tmp_path / "regla").chmod(0o755)
    text = """eval "$(regla completion bash)"
    COMP_LINE="regla distill train.ep" COMP_POINT=22 COMP_TYPE=9
    _python_argcomplete regla train.ep distill; printf '%s' "${COMPREPLY[@]}" """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "train.epochs="
