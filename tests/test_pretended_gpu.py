"""What `tests/test_gpu.py` asks of a GPU, and the pretended one can answer; for the rest a real one is needed."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

ANSWERED = (
    "codecs or statistics or (teacher and waits) or sample or measured or (shards and float32) or (loss and batch) "
    "or nvjpeg_on"
)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one answers")
def test_no_tensor_of_extraction_or_loss_is_left_on_the_cpu_and_none_is_waited_for():
    command = [sys.executable, "-m", "pytest", "-p", "tests.pretended_gpu", "tests/test_gpu.py", "-k", ANSWERED]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert "21 passed" in ended.stdout
    assert "skipped" not in ended.stdout
