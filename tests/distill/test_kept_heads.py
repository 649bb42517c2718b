"""Heads that are kept beside the student answer as in training, in the teachers' own scale."""

import json

import pytest
import torch

from pipeline.distill.job import make_job
from pipeline.distill.kept_heads import load_heads, save_heads
from pipeline.distill.task import build_distiller, build_reader
from pipeline.errors import UserError
from pipeline.export.bundle import make_bundle
from pipeline.export.folder import export_bundle
from pipeline.student.loading import load_student
from tests.student.conftest import export_student

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "student.taps=[8,16,32]"]


@pytest.fixture(params=["mean_std", "phi_s"])
def exported(request, photo_config, filled, tmp_path):
    """The folder, the distiller that was exported into it, and a batch."""
    config = photo_config(*STUDENT, f"loss.standardise={request.param}")
    job = make_job(config, filled.plan)
    distiller = build_distiller(job).eval()
    export_student(distiller.student.encoder, config, tmp_path / "student")
    save_heads(distiller, config.student.head_dim, tmp_path / "student")
    return tmp_path / "student", distiller, next(build_reader(job).batches(0))


def test_they_come_back_and_answer_in_the_teachers_scale(exported):
    folder, distiller, batch = exported
    with torch.no_grad():
        answers = load_heads(folder)(batch.images / 255)
        output = distiller.student(batch.images)
        for target in distiller.targets:
            label = distiller.labels[target.teacher.id]
            predicted = target.heads["summary"](output.summary)
            standardised = target.standardisers["summary"](answers[label]["summary"])
            torch.testing.assert_close(standardised, predicted, rtol=1e-4, atol=1e-4)
            assert answers[label]["patches"].shape == (16, 2, 2, target.teacher.spec.patch_dim)
            tokens = target.heads["patches"](output.feature_map.permute(0, 2, 3, 1))
            torch.testing.assert_close(
                target.standardisers["patches"](answers[label]["patches"]), tokens, rtol=1e-4, atol=1e-4
            )


@torch.no_grad()
@pytest.mark.parametrize("exported", ["mean_std"], indirect=True)
def test_they_are_exported_with_the_student_as_further_outputs(exported, tmp_path):
    folder, _, batch = exported
    bundle = make_bundle(load_student(str(folder)), 32, heads=True)
    described = export_bundle(bundle, ["safetensors", "torch_export"], tmp_path / "exported", rounds=1)
    label = load_heads(tmp_path / "exported").labels[0]
    assert [output["name"] for output in described["outputs"]][:2] == ["output", f"{label}.summary"]
    _, *heads = torch.export.load(tmp_path / "exported/student.pt2").module()(batch.images / 255)
    expected = load_heads(folder)(batch.images / 255)
    for found, (name, _) in zip(heads, list(bundle.outputs.items())[1:], strict=True):
        torch.testing.assert_close(
            found, expected[name.rpartition(".")[0]][name.rpartition(".")[2]], rtol=1e-3, atol=1e-4
        )


def test_what_does_not_fit_is_refused_with_the_remedy(exported):
    folder, _, _ = exported
    described = json.loads((folder / "heads.json").read_text())
    for broken in ({**described, "hidden": 31}, {**described, "teachers": described["teachers"][:1]}, {}):
        (folder / "heads.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"has no heads that fit its student .*student\.keep_heads=true"):
            load_heads(folder)
