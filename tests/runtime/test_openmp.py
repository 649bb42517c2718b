import os
import subprocess
import sys

import pytest

from pipeline.runtime.openmp import short_waits, wait_shortly
from tests.conftest import REPOSITORY


@pytest.fixture
def plain(monkeypatch):
    """An environment in which the user has set nothing."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "x")  # so that it is removed again at the end
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def test_threads_wait_shortly_unless_the_user_has_set_how(plain):
    wait_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert short_waits() == {}
    plain.setenv("GOMP_SPINCOUNT", "7")
    wait_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    plain.delenv("GOMP_SPINCOUNT")
    plain.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_shortly()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_after_torch_is_imported_it_is_left_to_new_processes(plain):
    plain.setitem(sys.modules, "torch", object())
    wait_shortly()
    assert short_waits() == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.usefixtures("plain")
def test_a_job_sets_it_before_torch_is_imported():
    code = """
import os, sys
from jobs import _cli
def body(*_):
    import torch
    assert os.environ["GOMP_SPINCOUNT"]
    return {}
assert "torch" not in sys.modules
from pipeline.runs.config import JobConfig
_cli.run(JobConfig, lambda *given: ("torch" not in sys.modules or sys.exit("torch came first")) and body(*given), "")
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
