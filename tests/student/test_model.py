import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.task import build_student
from pipeline.errors import UserError
from pipeline.student.model import (
    Encoder,
    FuseNeck,
    Student,
    create_backbone,
    distillation_head,
    freeze_unused,
    load_encoder,
)
from tests.student.conftest import export_student

TINY_VIT = ("timm/test_vit", {"img_size": 32, "patch_size": 16})


def _pixels(count=2, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "args", "dim", "size", "grid"),
    [
        ("timm/mobilenetv4_conv_small", {}, 960, 64, (4, 4)),
        ("regla_t", {}, 256, 64, (4, 4)),
        ("timm/test_resnet", {}, 96, 32, (2, 2)),
        ("timm/test_convnext", {}, 64, 48, (3, 3)),
        ("timm/swin_tiny_patch4_window7_224", {"img_size": 32, "depths": (1, 1, 1, 1)}, 768, 32, (2, 2)),
        (*TINY_VIT, 64, 32, (2, 2)),
        ("timm/efficientvit_m0", {}, 192, 64, (4, 4)),
    ],
)
def test_any_backbone_is_a_summary_and_a_grid_of_tokens(name, args, dim, size, grid):
    encoder = Encoder(create_backbone(name, args))
    student = Student(encoder, token_dim=12)
    freeze_unused(student, size)
    assert student.training
    output = student(_pixels(size=size))
    assert encoder.dim == dim
    assert output.summary.shape == (2, dim)
    assert output.feature_map.shape == (2, 12, *grid)
    (output.summary.sum() + output.feature_map.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in student.neck.parameters())
    idle = {key for key, parameter in student.named_parameters() if parameter.grad is None}
    assert idle == {key for key, parameter in student.named_parameters() if not parameter.requires_grad}
    assert bool(idle) == {"regla_t": False, "timm/test_vit": True}.get(name, bool(idle))


def test_tokens_come_from_stride_16_and_the_summary_from_the_last_map():
    student = Student(Encoder(create_backbone("timm/test_resnet")), 12).eval()
    assert [student.encoder.strides[level] for level in student.levels] == [16, 32]
    pixels = _pixels()
    with torch.no_grad():
        fine, coarse = student.encoder.maps(pixels / 255, student.levels)
        output = student(pixels)
    assert (fine.shape[-1], coarse.shape[-1]) == (2, 1)
    torch.testing.assert_close(output.summary, coarse.mean(dim=(2, 3)))
    torch.testing.assert_close(output.feature_map, student.neck([fine, coarse]))


def test_what_ships_gives_the_summary_that_was_distilled():
    student = Student(Encoder(create_backbone("regla_t")), 12).eval()
    pixels = _pixels()
    with torch.no_grad():
        torch.testing.assert_close(student.encoder(pixels.float() / 255), student(pixels).summary)


def test_the_backbone_sees_pixels_normalised_as_its_configuration_says():
    encoder = Encoder(create_backbone("timm/test_resnet")).eval()
    seen = []
    encoder.backbone.forward_intermediates = lambda images, **_: [seen.append(images) or torch.zeros(2, 96, 1, 1)]
    images = torch.rand(2, 3, 32, 32)
    encoder(images)
    mean, std = (torch.tensor(encoder.backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert not torch.equal(mean, torch.zeros(3, 1, 1))
    torch.testing.assert_close(seen[0], (images - mean) / std)


def test_normalisation_moves_with_the_encoder_and_is_no_weight():
    encoder = Encoder(create_backbone("timm/test_resnet"))
    assert not [name for name in encoder.state_dict() if not name.startswith("backbone.")]
    assert encoder.to(torch.float64).mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("regla_x", "regla_xl"),
        ("timm/mobilenetv4_conv_smal", "mobilenetv4_conv_small"),
        ("mobilenet_v4_conv_small", "mobilenetv4_conv_small"),
    ],
)
def test_an_unknown_name_brings_near_ones(name, near):
    with pytest.raises(
        UserError, match=rf"student\.name: timm has no model {name.removeprefix('timm/')}; did you .*{near}"
    ):
        create_backbone(name)


def test_a_name_that_is_near_to_none_is_just_named():
    with pytest.raises(UserError, match=r"timm has no model qqqqqqqqqqqq$"):
        create_backbone("timm/qqqqqqqqqqqq")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("regla_t", {"depth": 3}),
        ("regla_t", {"dims": 3}),
        ("timm/mobilenetv4_conv_small", {"depth": 3}),
        ("timm/mobilenetv4_conv_small", {"act_layer": "nope"}),
    ],
)
def test_arguments_that_the_model_refuses_are_shown(name, args):
    with pytest.raises(UserError, match=rf"student\.args: {name.removeprefix('timm/')} refuses .*{next(iter(args))}"):
        create_backbone(name, args)


@pytest.mark.parametrize("args", [{"pretrained": True}, {"pretrained_cfg_overlay": {"file": "no.safetensors"}}])
def test_arguments_that_make_timm_read_files_are_refused(args):
    with pytest.raises(
        UserError, match=rf"student\.args must not contain {next(iter(args))}, .* set student\.weights instead"
    ):
        create_backbone("regla_t", args)


def test_a_model_without_intermediate_features_is_refused():
    with pytest.raises(UserError, match=r"student\.name: .*gives no intermediate features"):
        create_backbone("timm/test_resnet", {"features_only": True})


@pytest.mark.parametrize(
    ("name", "args", "taps", "tap_strides"),
    [
        ("regla_t", {}, [16, 32], [16, 32]),
        ("regla_t", {}, [32, 8, 16], [8, 16, 32]),
        ("regla_t", {}, [16], [16]),
        ("regla_t", {}, [32], [16, 32]),
        (*TINY_VIT, [8, 16, 32], [16]),
        ("timm/efficientvit_m0", {}, [16, 32], [16, 32]),
    ],
)
def test_the_taps_are_fused_on_the_grid_of_stride_16(name, args, taps, tap_strides):
    student = Student(Encoder(create_backbone(name, args)), 12, taps)
    assert student.tap_strides == tap_strides
    output = student(_pixels(size=32 if name.startswith("timm/test_vit") else 64))
    assert output.feature_map.shape[-1] == (2 if name.startswith("timm/test_vit") else 4)
    assert output.summary.shape == (2, student.encoder.dim)


def test_a_finer_level_of_odd_size_is_brought_to_the_grid():
    student = Student(Encoder(create_backbone("regla_t")), 12, [8, 16, 32]).eval()
    with torch.no_grad():
        assert student(_pixels(size=84)).feature_map.shape == (2, 12, 6, 6)


def test_the_neck_adds_all_levels_on_its_grid():
    neck = FuseNeck([2, 3, 5], [8, 16, 32], 16, 7).eval()
    maps = [torch.randn(2, 2, 8, 12), torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)]
    assert neck(maps).shape == (2, 7, 4, 6)
    alone = [neck([part * (i == number) for i, part in enumerate(maps)]) for number in range(3)]
    torch.testing.assert_close(neck(maps), sum(alone))
    flat = neck([torch.zeros_like(maps[0]), torch.zeros_like(maps[1]), torch.ones_like(maps[2])])
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))


def test_a_head_ignores_the_scale_of_what_it_is_given():
    head = distillation_head(6, 16, 4)
    tokens = torch.randn(2, 3, 3, 6)
    assert head(tokens).shape == (2, 3, 3, 4)
    torch.testing.assert_close(head(tokens * 100 + 7), head(tokens), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(layer, nn.GELU) for layer in head) == 1


@pytest.fixture
def exported(tmp_path):
    """Export the student of overrides with its BatchNorm statistics moved; gives its encoder and folder."""

    def export(*overrides):
        config = load_config(DistillJobConfig, None, ["student.input_size=32", *overrides])
        student = build_student(config)
        student.train()(_pixels(4))
        encoder = student.encoder.eval()
        export_student(encoder, config, tmp_path / "run/student")
        return encoder, tmp_path / "run/student"

    return export


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.name=timm/test_resnet"],
        ["student.name=regla_t"],
        ["student.name=timm/test_vit", "student.args={img_size: 32, patch_size: 16}"],
        ["student.name=timm/test_resnet", "student.args={num_classes: 3}"],
    ],
)
def test_an_exported_student_loads_here_and_with_plain_timm(exported, overrides):
    encoder, folder = exported(*overrides)
    assert sorted(file.name for file in folder.iterdir()) == ["student.json", "student.safetensors"]
    described = json.loads((folder / "student.json").read_text())
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(images)
        loaded = load_encoder(folder)
        assert not loaded.training
        assert torch.equal(loaded(images), expected)
        plain = timm.create_model(described["model"], **described["args"]).eval()
        plain.load_state_dict(load_file(folder / "student.safetensors"))
        mean, std = (torch.tensor(described[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        maps = plain.forward_intermediates((images - mean) / std, intermediates_only=True)
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), expected)
    assert described["input_size"] == 32


def _overwrite(folder, file, content):
    (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "student.json").unlink(), "No such file"),
        (lambda folder: (folder / "student.safetensors").unlink(), "No such file"),
        (lambda folder: _overwrite(folder, "student.json", b"{"), "Expecting"),
        (lambda folder: _overwrite(folder, "student.json", b"[]"), "list indices"),
        (lambda folder: _overwrite(folder, "student.json", b"{}"), "model"),
        (lambda folder: _overwrite(folder, "student.safetensors", b"1234567890"), "header"),
        (lambda folder: _overwrite(folder, "student.safetensors", b""), "header"),
        (
            lambda folder: _overwrite(folder, "student.json", b'{"model": "test_convnext", "args": {}}'),
            "Missing key",
        ),
    ],
)
def test_a_folder_that_is_no_exported_student_is_named(exported, spoil, reason):
    _, folder = exported("student.name=timm/test_resnet")
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_encoder(folder)
    assert str(error.value).startswith(f"{folder} is not an exported student: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exported_student_of_an_unknown_model_is_named(exported):
    _, folder = exported("student.name=timm/test_resnet")
    _overwrite(folder, "student.json", b'{"model": "no_such_net", "args": {}}')
    with pytest.raises(UserError, match="timm has no model no_such_net"):
        load_encoder(folder)
