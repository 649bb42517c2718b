"""The wheel: what it holds, that nothing collides with it, and that it works without a checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY
from tests.fakes import SMALL_JOB

OURS = ("jobs", "pipeline", "recipes", "regla", "teachers")
LIBRARIES = sysconfig.get_path("purelib")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network access from a copy of what it is made of."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in OURS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        target,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "regla = regla.cli:main" in archive.read(entry_points).decode()
        (description,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(description).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    files = [path for name in OURS for path in (REPOSITORY / name).rglob("*") if path.is_file()]
    assert packed == {path.relative_to(REPOSITORY).as_posix() for path in files if "__pycache__" not in path.parts}
    assert "regla/api.py" in packed


def test_no_dependency_has_a_top_level_name_of_the_wheel():
    pinned = (REPOSITORY / "requirements.lock").read_text().splitlines()
    names = {canonicalize_name(line.partition("==")[0]) for line in pinned if "==" in line and not line.startswith(" ")}
    seen = set()
    for distribution in metadata.distributions(path=[LIBRARIES]):
        name = canonicalize_name(distribution.name)
        seen.add(name)
        tops = {Path(file).parts[0].removesuffix(".py") for file in distribution.files or ()}
        assert not tops & set(OURS), f"{name} ships {tops & set(OURS)}"
    assert {"torch", "ray", "mlflow"} <= seen & names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the commands of an environment that has the wheel and sees the dependencies, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", "-q", wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (site / "dependencies.pth").write_text(LIBRARIES)
    return folder / "bin"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """An empty folder as the current one, and no checkout on the path of this process's children."""
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_command_finds_the_recipes_of_the_wheel(installed, outside):
    text = run([installed / "regla", "distill", "own_images.yaml", "data.train=samples", "--help"])
    assert text.startswith("usage: regla distill ")
    script = "import jobs._cli as cli; print(cli.find_recipe('recipes/own_images.yaml'), cli.DEFAULT_RECIPE.is_file())"
    path, default = run([installed / "python", "-c", script]).split()
    assert Path(path).is_relative_to(installed.parent)
    assert default == "True"
    assert REPOSITORY not in Path(path).parents


LOG_IMPORTS = f"""import atexit, os, sys
def log():
    files = {{str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}}
    ours = [file for file in files if file.startswith({f"{REPOSITORY}/"!r}) and not file.startswith({LIBRARIES!r})]
    with open(os.environ["IMPORTED"], "a") as file:
        file.writelines(f"{{line}}\\n" for line in [*ours, "end"])
atexit.register(log)
"""
"""Writes down, at the end of each process, what it has imported from the checkout."""


@pytest.mark.slow
def test_the_installed_command_distils_from_another_folder(installed, outside):
    (site,) = installed.parent.glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(LOG_IMPORTS)
    small = [*SMALL_JOB, "train.epochs=1", "teachers=[hog]", "teachers.0.input_size=32", "train.workers=2"]
    environment = {**os.environ, "IMPORTED": str(outside / "imported")}
    text = run([installed / "regla", "distill", "quickstart.yaml", *small], env=environment)
    figures = json.loads(text.splitlines()[-1])
    assert figures["shards_computed"] == 4
    student = Path(figures["student"])
    assert student.is_relative_to(outside / "work")
    assert set((outside / "imported").read_text().splitlines()) == {"end"}

    script = f"""
import numpy, regla
predictor = regla.load_predictor({str(student)!r})
print(len(predictor.features([numpy.zeros((32, 32, 3), numpy.uint8)] * 2)))
print(regla.__file__)
"""
    count, file = run([installed / "python", "-c", script]).split()
    assert count == "2"
    assert Path(file).is_relative_to(installed.parent)
