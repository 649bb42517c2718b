"""Which imports bring in torch's compiler, and that it is there where it is used."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def run_new(code: str) -> str:
    """What this code prints in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()


def test_neither_the_job_nor_its_first_step_imports_the_compiler():
    code = """
import sys
import jobs.distill, pipeline.training.ray_train, pipeline.distill.task
import torch
from pipeline.training.optimizer import EagerAdamW
layer = torch.nn.Linear(2, 2)
optimizer = EagerAdamW(layer.parameters(), fused=True)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
heavy = "matplotlib mlflow networkx pandas ray sympy torch._dynamo torch._inductor transformers triton"
print(*sorted({*heavy.split()} & sys.modules.keys()))
"""
    assert run_new(code) == ""


def test_what_needs_the_compiler_imports_it():
    code = """
import sys
import pipeline.runtime
import torch, torchvision
from torchvision import tv_tensors
before = "torch._dynamo" in sys.modules, "torch._dynamo.utils" in sys.modules
module = sys.modules["torchvision.ops.roi_align"]
there = module.is_compile_supported("cpu")
from torch._dynamo.utils import is_compile_supported
double = torch.compile(lambda values: tv_tensors.wrap(values * 2, like=values), backend="eager")
image = tv_tensors.Image(torch.ones(3, 2, 2))
print(before, there == is_compile_supported("cpu"), type(double(image)).__name__, double(image).sum().item())
"""
    assert run_new(code) == "(False, False) True Image 24.0"


@pytest.mark.parametrize("first", ["", "import torch._dynamo"])
def test_other_versions_get_what_they_take(tmp_path, first):
    """A torchvision whose module takes another name of the compiler."""
    package = tmp_path / "torchvision" / "ops"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "roi_align.py").write_text("from torch._dynamo.utils import counters\n")
    code = f"""
import sys
{first}
sys.path.insert(0, {str(tmp_path)!r})
import pipeline.runtime
import torchvision.ops.roi_align as module
from torch._dynamo.utils import counters
print(module.counters is counters)
"""
    assert run_new(code) == "True"
