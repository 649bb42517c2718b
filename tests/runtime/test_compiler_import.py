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


def test_a_plan_of_teachers_does_not_import_the_compiler_and_leaves_no_trace():
    code = """
import sys
from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
for config in (
    TeacherConfig(model="dinov2/vits14", weights="random", input_size=28, args=small),
    TeacherConfig(model="sam/vit_b", weights="random", input_size=32, args={"img_size": 32, **small, "global_attn_indexes": [0]}),
    TeacherConfig(model="timm/resnet18", weights="random", input_size=32),
):
    print(make_teacher(config).spec.grid)
print("torch._dynamo" in sys.modules)
import torch
with torch.device("meta"):
    joined = torch.cat([torch.empty(2, 3), torch.empty(1, 3)])
double = torch.compile(lambda values: torch.cat([values, values]), backend="eager")
print("torch._dynamo" in sys.modules, tuple(joined.shape), double(torch.ones(2)).sum().item())
"""
    assert run_new(code).split("\n") == ["(2, 2)", "(2, 2)", "(1, 1)", "False", "True (3, 3) 4.0"]


def test_a_teacher_that_takes_the_compiler_itself_gets_it(tmp_path):
    (tmp_path / "own.py").write_text(
        """
import torch
from teachers.hog import hog
def compiled(options):
    import torch._dynamo
    torch._dynamo.reset()
    return hog(options)
"""
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
print(make_teacher(TeacherConfig(model="own:compiled", input_size=64)).spec.name, hasattr(sys.modules["torch._dynamo"], "reset"))
"""
    assert run_new(code) == "hog True"


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
