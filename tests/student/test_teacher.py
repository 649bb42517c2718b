"""A student as a teacher: what it says, what it is called, and how it is refused."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.task import build_student
from teachers.base import TeacherError, WeightsNotFoundError
from teachers.registry import create_teacher
from tests.student.conftest import export_student


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of an exported student, and its encoder."""
    config = load_config(DistillJobConfig, None, ["student.name=timm/test_resnet", "student.input_size=64"])
    folder = tmp_path_factory.mktemp("student")
    encoder = build_student(config).encoder
    export_student(encoder, config, folder)
    return folder, encoder.eval()


def test_it_says_what_the_student_says(exported):
    folder, encoder = exported
    teacher = make_teacher(TeacherConfig(model="student", weights=str(folder)))
    spec = teacher.spec
    assert (spec.name, spec.input_size, spec.grid) == ("student/test_resnet", (64, 64), (4, 4))
    assert (spec.summary_dim, spec.patch_dim) == (encoder.channels[-1], sum(encoder.channels[-2:]))
    assert spec.weights.startswith("file:")
    teacher.load()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    output = teacher.encode(pixels)
    with torch.no_grad():
        fine, coarse = encoder.maps(pixels / 255, [3, 4])
        torch.testing.assert_close(output.summary, encoder(pixels / 255), rtol=1e-4, atol=1e-5)
    wide = F.interpolate(coarse, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.patches, torch.cat([fine, wide], dim=1).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_size_and_pooling_may_be_chosen_and_other_weights_are_another_teacher(exported, tmp_path):
    folder, _ = exported
    larger = create_teacher("pipeline.student.teacher:student", weights=str(folder), input_size=128, pool=2)
    assert (larger.spec.input_size, larger.spec.grid) == ((128, 128), (4, 4))
    config = load_config(DistillJobConfig, None, ["student.name=timm/test_resnet", "student.input_size=64", "seed=1"])
    export_student(build_student(config).encoder, config, tmp_path)
    specs = [make_teacher(TeacherConfig(model="student", weights=str(place))).spec for place in (folder, tmp_path)]
    assert specs[0].weights != specs[1].weights


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "pretrained"}, TeacherError, r"weights=pretrained is not a student; set the folder"),
        ({"weights": "random:1"}, TeacherError, r"weights=random:1 is not a student"),
        ({"weights": "nowhere"}, WeightsNotFoundError, r"nowhere is not the folder of an exported student"),
        ({"args": {"depth": 2}}, TeacherError, r"args are those of .*student\.json"),
        ({"pool": 3}, TeacherError, r"pool 3 does not divide its grid of 4x4"),
    ],
)
def test_what_it_cannot_be_is_refused(exported, changes, error, message):
    fields = {"weights": str(exported[0]), **changes}
    with pytest.raises(error, match=message):
        make_teacher(TeacherConfig(model="student", **fields))


def test_an_export_without_weights_is_named(exported, tmp_path):
    (tmp_path / "student.json").write_text((exported[0] / "student.json").read_text())
    with pytest.raises(WeightsNotFoundError, match=r"student\.safetensors"):
        make_teacher(TeacherConfig(model="student", weights=str(tmp_path)))
