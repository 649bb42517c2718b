"""A job in its own process (`debug=true`), of which a user's teacher is debugged as any other code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import distill
from jobs._cli import run
from pipeline.distill.config import DistillJobConfig
from tests.conftest import REPOSITORY
from tests.fakes import SMALL_JOB

OWN_TEACHER = """
from tests.fakes import ColourGrid


class Own(ColourGrid):
    def forward(self, images):
        {statement}
        return super().forward(images)


def make(options):
    return Own(8, "", 0.0, 0.0)
"""
COMMAND = [sys.executable, "jobs/distill.py", *SMALL_JOB, "teachers=['own_teacher:make']", "debug=true"]


def debug(folder: Path, statement: str, keys: str = "") -> subprocess.CompletedProcess[str]:
    """Distil from a teacher whose forward begins with a statement, with these keys typed into its terminal."""
    (folder / "own_teacher.py").write_text(OWN_TEACHER.format(statement=statement))
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    environment["PYTHONBREAKPOINT"] = "ray.util.rpdb._driver_set_trace"  # which Ray leaves where it was started before
    command = [*COMMAND, f"work={folder}/work"]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, input=keys, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_an_exception_in_a_teacher_is_an_ordinary_traceback(tmp_path):
    ended = debug(tmp_path, "images.no_such_method()")
    assert ended.returncode == 1
    assert f'File "{tmp_path}/own_teacher.py", line 7, in forward\n    images.no_such_method()' in ended.stderr
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_method'" in ended.stderr
    assert "RayTaskError" not in ended.stderr
    assert "site-packages/ray" not in ended.stderr


@pytest.mark.slow
def test_a_breakpoint_in_a_teacher_stops_there(tmp_path):
    ended = debug(tmp_path, "breakpoint()", "p 'images', tuple(images.shape)[1:]\nq\n")
    assert f"{tmp_path}/own_teacher.py(8)forward()" in ended.stdout
    assert "('images', (3, 32, 32))" in ended.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_in_its_own_process_gives_the_student_of_one_on_ray_to_the_bit(tmp_path, capsys, monkeypatch):
    teachers = "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}, hog]"
    students = []
    for debug in ("false", "true"):
        arguments = [*SMALL_JOB, teachers, "teachers.1.input_size=32", f"work={tmp_path}/{debug}", f"debug={debug}"]
        run(DistillJobConfig, distill.main, "", arguments)
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        students.append((Path(figures["student"]) / "student.safetensors").read_bytes())
        assert figures["shards_computed"] == 8
        monkeypatch.setattr("ray.data.from_items", no_ray)
        monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", no_ray)
    assert students[0] == students[1]


def no_ray(*_, **__):
    raise AssertionError("a job in its own process used Ray")
