"""Every command of README.md and docs/ is run on small data, or read by the parser and configuration that it is meant for.

`RUN` names those that are run for real, with what makes them short; all others must be of a kind that `check` knows. A new
command is one or the other, or this fails.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context, UsageError

from jobs._cli import _configure
from jobs.evaluate import ROOTS
from pipeline.config.jobs import job_root
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.config import EvaluateModelJobConfig
from pipeline.errors import UserError
from regla.cli import COMMANDS as COMMANDS_OF_REGLA
from tests.docs.commands import REPOSITORY, Command, collect, parse
from tests.fakes import SMALL_JOB, write_photos

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's command line, about Ray
COMMANDS = collect()
QUICK = [*SMALL_JOB, "train.epochs=1", "teachers=[hog]", "teachers.0.input_size=32"]
EVALUATE = ["data.samples.train=144", "data.samples.val=48", "data.samples.size=32", "cache.shard_size=48"]
CLASSIFY = [
    "data.samples.train=8",
    "data.samples.val=4",
    "data.samples.size=32",
    "train.batch_size=4",
    "train.epochs=1",
]
CLASSIFY += ["student.input_size=32", "finetune.data_workers=0", "finetune.pictures=1", "train.workers=1"]
FAST = ["--format", "safetensors", "hf"]

DISTIL = "python jobs/distill.py recipes/quickstart.yaml"
FINETUNE = "python jobs/finetune.py recipes/classify.yaml finetune.student=models:/quickstart-student@best"
RUN: dict[str, list[str]] = {
    DISTIL: QUICK,
    "python jobs/evaluate.py knn evaluate.student=models:/quickstart-student@best": EVALUATE,
    FINETUNE: CLASSIFY,
    "python jobs/predict.py models:/classify-classify@best photos --to predictions": [],
    "python jobs/predict.py models:/quickstart-student@best photos --to features.parquet": [],
    "python jobs/export.py models:/quickstart-student@best --to exported": FAST,
    "python jobs/export.py models:/classify-classify@best --to classifier --format safetensors hf": [],
    "python jobs/clean.py": [],
    "python jobs/clean.py --checkpoints --yes": [],
    "python jobs/precompute.py --list": [],
    "python jobs/precompute.py recipes/quickstart.yaml --verify": QUICK,
    "python jobs/precompute.py recipes/quickstart.yaml --verify --repair": QUICK,
    "python jobs/precompute.py --gc --yes": [],
}
"""What is run for real, by its text, with what is added to it."""

SHELL = {".", "export", "cd", "source", "eval"}
"""Words of the shell itself; nothing of ours to try."""
OTHERS = {
    "benchmarks/imagenette_on_a_gpu.sh": ("imagenette",),
    "benchmarks/on_a_gpu.sh": ("cuda",),
    "kubectl": ("apply",),
    "pip": ("install",),
}
"""Programs that cannot run here, and what is asked of them; files that they are given must be there."""


def told(command: Command) -> str:
    """Its identity for pytest."""
    return f"{command.page}: {command.text}"[:90]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder with the repository's recipes and jobs, and a few photos."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("recipes", "jobs", "benchmarks", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_photos(folder / "photos", 6)
    return folder


def start(text, more):
    """Run a job in this process, as its file says."""
    _, script, *arguments = shlex.split(text)
    flags = next((place for place, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    arguments[flags:flags] = more  # a parser takes overrides in one piece
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


@pytest.fixture(scope="module")
def trained(place, ray_session):
    """A student and a classifier on it, made by the commands of the tutorial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in (DISTIL, FINETUNE):
            start(command, RUN[command])
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return place


@pytest.fixture(autouse=True)
def own_task(tmp_path, monkeypatch):
    """The module that docs/howto/own-task.md has its readers save."""
    page = (REPOSITORY / "docs/howto/own-task.md").read_text(encoding="utf-8")
    (tmp_path / "my_tasks.py").write_text("".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_no_declared_command_is_left_over():
    texts = {re.sub(r"\s+#.*", "", command.text) for command in COMMANDS}
    assert set(RUN) <= texts


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in RUN if text not in (DISTIL, FINETUNE)])
def test_a_command_of_the_pages_does_what_they_say(text, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    start(text, RUN[text])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS, ids=told)
def test_a_command_is_understood_by_what_it_is_for(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    check(command.words)


@pytest.mark.parametrize(
    "words",
    [
        ["python", "jobs/distill.py", "recipes/quickstart.yaml", "--dry-wash"],
        ["python", "jobs/distill.py", "recipes/quickstart.yaml", "train.epoch=5"],
        ["python", "jobs/evaluate.py", "guess", "data.train=photos"],
        ["python", "jobs/export.py", "student", "--format", "tflite"],
        ["python", "jobs/no_such_job.py"],
        ["regla", "distil", "quickstart.yaml"],
        ["regla", "distill", "nowhere.yaml"],
        ["make", "coffee"],
        ["make", "submit", "JOB=jobs/distill.py recipes/quickstart.yaml epochs=5"],
        ["ray", "start", "--haed"],
        ["mlflow", "show"],
        ["kubectl", "apply", "-f", "no_such.yaml"],
        ["docker", "run", "regla"],
    ],
    ids=" ".join,
)
def test_a_command_that_would_be_refused_fails_here(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((AssertionError, SystemExit, OSError, UserError)):
        check(words)


def check(words):
    """Fail where a command would be refused for how it is written."""
    first, *rest = words
    first = first.removeprefix(".venv/bin/")
    if first == "regla":
        assert rest[0] in COMMANDS_OF_REGLA
        rest = rest[1:] if rest[0] == "submit" else rest  # of the job that follows
        assert rest[0] in COMMANDS_OF_REGLA
        first, rest = "python", [f"jobs/{rest[0]}.py", *rest[1:]]
    if first == "python" and rest[0] == "-m":
        rest = [f"{rest[1].replace('.', '/')}.py", *rest[2:]]
    if first == "python":
        options = parse(rest[0], rest[1:])
        if hasattr(options, "items"):
            _configure(root_of(rest), options.items, REPOSITORY / "recipes/quickstart.yaml")
        for recipe in (word for word in rest if word.startswith("recipes/") and word.endswith(".yaml")):
            load_config(root_of(rest), recipe)
    elif first == "make":
        target = next(word for word in rest if "=" not in word)
        assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE), target
        for job in (word.removeprefix("JOB=") for word in rest if word.startswith("JOB=")):
            asked = subprocess.run(
                ["make", "--no-print-directory", "-n", *rest], capture_output=True, text=True, check=True
            ).stdout
            assert shlex.split(asked.splitlines()[-1])[1:] == ["jobs/submit.py", *shlex.split(job)]
            check(["python", *shlex.split(job)])
    elif first in ("ray", "mlflow"):
        click(first, rest)
    elif first in OTHERS:
        assert rest[0] in OTHERS[first]
        assert all((REPOSITORY / word).is_file() for word in rest if word.endswith(".yaml"))
    else:
        assert first in SHELL, f"{first}: neither run nor read by this test; add it to RUN, or say how it is read"


def root_of(words):
    """The configuration of a script."""
    name = Path(words[0]).stem
    if name == "evaluate":
        return EvaluateModelJobConfig if ":" in words[1] else ROOTS[words[1]]
    return job_root("finetune" if name == "downstream" else name) or DistillJobConfig


def click(program, words):
    """Let a program of click read its words, without running it."""
    if program == "ray":
        from ray.scripts.scripts import cli
    else:
        from mlflow.cli import cli
    name, *rest = words
    command = cli.get_command(Context(cli), name)
    assert command is not None, f"{program} has no {name}"
    try:
        command.make_context(name, list(rest))
    except UsageError as error:
        raise AssertionError(f"{program} {' '.join(words)}: {error.format_message()}") from error
