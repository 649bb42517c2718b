"""The lines that a distillation prints load the student that it exported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.runs.usage import loading_lines
from pipeline.student.model import Encoder, create_backbone, save_encoder

REPOSITORY = Path(__file__).resolve().parents[2]


def _exported(folder, name, args):
    encoder = Encoder(create_backbone(name, args)).eval()
    save_encoder(encoder, name, args, 64, folder)
    return encoder, loading_lines(folder)


@pytest.mark.parametrize(("name", "args"), [("regla_t", {"depths": (1, 1, 1, 1)}), ("timm/test_resnet", {})])
def test_the_lines_of_this_project_and_of_timm_can_be_pasted(tmp_path, name, args):
    encoder, lines = _exported(tmp_path / "my student", name, args)
    scope: dict = {}
    exec(lines["timm"], scope)
    for name, weights in encoder.backbone.state_dict().items():
        torch.testing.assert_close(scope["model"].state_dict()[name], weights)
    exec(lines["here"], scope)
    assert scope["model"].features([Image.new("RGB", (80, 60))]).shape[0] == 1


@pytest.mark.slow
def test_the_line_of_onnx_can_be_pasted(tmp_path):
    _, lines = _exported(tmp_path / "my student", "timm/test_resnet", {})
    subprocess.run(lines["ONNX"].replace("python ", f"{sys.executable} ", 1), shell=True, check=True, cwd=REPOSITORY)
    assert (tmp_path / "exported/student.onnx").is_file()
