"""Exported students give what eager gives, at more than one size."""

import sys

import onnx
import onnxruntime
import pytest
import timm
import torch

import pipeline.student.regla  # noqa: F401
from pipeline.errors import UserError
from pipeline.export.graphs import OPSET, export_coreml, export_onnx

SIZES = [(1, 64, 64), (3, 97, 130), (2, 224, 224)]


@pytest.fixture(scope="module")
def student(live):
    """A short ReGLA-T, fused."""
    torch.manual_seed(0)
    return live(timm.create_model("regla_t", num_classes=10, depths=(1, 1, 2, 1))).fuse()


@pytest.fixture(scope="module")
def onnx_file(student, tmp_path_factory):
    return export_onnx(student, tmp_path_factory.mktemp("onnx") / "student.onnx", torch.randn(2, 3, 64, 96))


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_onnx_file_is_valid_and_leaves_batch_and_size_open(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET >= 17
    sides = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides[1] == 3
    assert all(isinstance(sides[i], str) for i in (0, 2, 3))
    assert list(onnx_file.parent.iterdir()) == [onnx_file]


def test_onnx_equals_eager_at_other_batches_and_sizes(student, onnx_file):
    run = session(onnx_file)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = student(x)
        (out,) = run.run(None, {"image": x.numpy()})
        assert torch.allclose(torch.from_numpy(out), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_static_onnx_file_takes_its_shape_alone(student, tmp_path):
    x = torch.randn(1, 3, 64, 64)
    run = session(export_onnx(student, tmp_path / "static.onnx", x, dynamic=()))
    assert run.get_inputs()[0].shape == [1, 3, 64, 64]
    with torch.no_grad():
        expected = student(x)
    assert torch.allclose(torch.from_numpy(run.run(None, {"image": x.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)


def test_an_unfused_student_exports_too(live, tmp_path):
    model, x = live(timm.create_model("regla_t", num_classes=10, depths=(1, 1, 1, 1))), torch.randn(1, 3, 64, 64)
    run = session(export_onnx(model, tmp_path / "whole.onnx", x, dynamic=()))
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(run.run(None, {"image": x.numpy()})[0]), model(x), atol=1e-4)


@pytest.mark.parametrize("export", [export_onnx, export_coreml])
def test_a_model_in_training_mode_is_refused(export, tmp_path):
    model = timm.create_model("regla_t", depths=(1, 1, 1, 1)).train()
    with pytest.raises(UserError, match=r"eval\(\)"):
        export(model, tmp_path / "out", torch.randn(1, 3, 64, 64))


def test_coreml_package_declares_input_and_output(student, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    x = torch.randn(1, 3, 64, 96)
    path = export_coreml(student, tmp_path / "student.mlpackage", x)
    loaded = coremltools.models.MLModel(str(path), skip_model_load=sys.platform != "darwin")
    spec = loaded.get_spec()
    (image,), (output,) = spec.description.input, spec.description.output
    assert (image.name, list(image.type.multiArrayType.shape)) == ("image", [1, 3, 64, 96])
    assert output.name == "output"
    if sys.platform == "darwin":
        with torch.no_grad():
            expected = student(x)
        out = torch.as_tensor(loaded.predict({"image": x.numpy()})["output"])
        assert torch.allclose(out.float(), expected, atol=2e-2 * float(expected.abs().max()))


def test_coreml_without_coremltools_says_what_to_install(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UserError, match="coreml"):
        export_coreml(student, tmp_path / "student.mlpackage", torch.randn(1, 3, 64, 64))
